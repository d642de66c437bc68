package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// streamPace is the pause between two chunks of a stream, each way.
const streamPace = 2 * time.Millisecond

// place is where something runs: a pod or an outside.
type place interface{ Do(func() error) error }

// stream is a long-lived connection that is never silent: a counter runs each way, and the far end checks every byte of it.
type stream struct {
	name           string
	client, server net.Conn
	there, back    flow
	ended          chan struct{} // closed when the client has learned of the end
	err            error         // what it learned; valid after over
	at             time.Time     // when; valid after ended
	over           chan struct{} // closed when both ends have learned of it
	stop           chan struct{} // closed: the client ends it in good order
}

// flow is one direction.
type flow struct {
	sent, got atomic.Uint64 // bytes
	broken    atomic.Pointer[string]
}

// openStream connects, and fails the test if that does not work. The server listens where it is told to, for this one stream.
func openStream(t testing.TB, name string, from, to place, at netip.AddrPort) *stream {
	t.Helper()
	var l net.Listener
	if err := to.Do(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", at.Port()))
		return err
	}); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			accepted <- c
		}
		close(accepted)
	}()
	s := &stream{name: name, ended: make(chan struct{}), over: make(chan struct{}), stop: make(chan struct{})}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := from.Do(func() (err error) {
		s.client, err = new(net.Dialer).DialContext(ctx, "tcp", at.String())
		return err
	}); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	select {
	case s.server = <-accepted:
	case <-ctx.Done():
		t.Fatalf("%s: never came about", name)
	}
	var done sync.WaitGroup
	var wrote, got error
	done.Go(func() { wrote = write(s.client, &s.there, s.stop) })
	done.Go(func() { _ = check(s.server, &s.there) })
	done.Go(func() { _ = write(s.server, &s.back, s.stop) })
	done.Go(func() {
		got = check(s.client, &s.back)
		s.at = time.Now()
		close(s.ended)
	})
	go func() {
		done.Wait()
		s.err = got
		if got == nil && errors.Is(wrote, syscall.ECONNRESET) { // the kernel tells of a reset once, to whoever asks first
			s.err = wrote
		}
		close(s.over)
	}()
	t.Cleanup(func() { s.client.Close(); s.server.Close(); <-s.over })
	return s
}

// write sends numbers until it is told to stop, then it closes its direction.
func write(c net.Conn, f *flow, stop <-chan struct{}) error {
	chunk := make([]byte, 0, 1024)
	for n := uint64(0); ; {
		chunk = chunk[:0]
		for range cap(chunk) / 8 {
			chunk = binary.BigEndian.AppendUint64(chunk, n)
			n++
		}
		k, err := c.Write(chunk)
		f.sent.Add(uint64(k))
		if err != nil {
			return err
		}
		select {
		case <-stop:
			return c.(*net.TCPConn).CloseWrite()
		case <-time.After(streamPace):
		}
	}
}

// check reads and checks the numbers, and returns what ended them; nil: the other end, in good order.
func check(c net.Conn, f *flow) error {
	buf := make([]byte, 8)
	for n := uint64(0); ; n++ {
		k, err := io.ReadFull(c, buf)
		f.got.Add(uint64(k))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if v := binary.BigEndian.Uint64(buf); v != n {
			what := fmt.Sprintf("number %d came where %d should", v, n)
			f.broken.CompareAndSwap(nil, &what)
			return errors.New(what)
		}
	}
}

// alive fails the test unless bytes still flow both ways.
func (s *stream) alive(t testing.TB) {
	t.Helper()
	there, back := s.there.got.Load(), s.back.got.Load()
	deadline := time.After(patience)
	for s.there.got.Load() == there || s.back.got.Load() == back {
		select {
		case <-s.ended:
			t.Errorf("%s was cut, and policy allows it", s.name)
			return
		case <-deadline:
			t.Errorf("%s stands still", s.name)
			return
		case <-time.After(streamPace):
		}
	}
}

// gone waits until both ends have learned of the end, and returns when the client did.
func (s *stream) gone(t testing.TB) time.Time {
	t.Helper()
	select {
	case <-s.over:
	case <-time.After(patience):
		t.Fatalf("%s: policy denies it, and it lives on", s.name)
	}
	return s.at
}

// finish ends the stream in good order; every byte that was sent must have come.
func (s *stream) finish(t testing.TB) {
	t.Helper()
	close(s.stop)
	select {
	case <-s.over:
	case <-time.After(patience):
		t.Fatalf("%s does not end", s.name)
	}
	for way, f := range map[string]*flow{"there": &s.there, "back": &s.back} {
		if what := f.broken.Load(); what != nil || s.err != nil || f.sent.Load() != f.got.Load() {
			t.Errorf("%s, %s: of %d bytes %d came (%v)", s.name, way, f.sent.Load(), f.got.Load(), s.err)
		}
	}
}
