package sandbox

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/verdict"
)

// streamPace is the pause between two lines of a stream.
const streamPace = 5 * time.Millisecond

// Stream is a long-lived connection from one pod to another that is never silent: numbered lines go there, and each has to come back,
// in order.
type Stream struct {
	From, To string // "namespace/pod"
	Addr     netip.AddrPort
	Opened   time.Time

	from, to *pod // as they were then
	conn     net.Conn
	sent     atomic.Uint64
	answered atomic.Uint64
	closing  atomic.Bool
	running  sync.WaitGroup
	ended    chan struct{}
	at       time.Time // when it ended; with err valid after ended
	err      error     // why; nil: in good order
}

// OpenStream connects a pod with a declared port of another, and returns when the first line has come back.
func (s *Sandbox) OpenStream(ctx context.Context, from, to string, port uint16) (*Stream, error) {
	src, dst := s.pods[from], s.pods[to]
	for name, p := range map[string]*pod{from: src, to: dst} {
		if p == nil {
			return nil, fmt.Errorf("stream %s → %s:%d: there is no pod %s", from, to, port, name)
		}
	}
	st := &Stream{From: from, To: to, Addr: netip.AddrPortFrom(matrix.PodAddrs(dst.spec)[0], port), from: src, to: dst, ended: make(chan struct{})}
	err := src.net.Do(func() (err error) {
		st.conn, err = new(net.Dialer).DialContext(ctx, "tcp", st.Addr.String())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", st, err)
	}
	st.Opened = time.Now()
	first := make(chan struct{})
	st.running.Go(func() { st.write() })
	st.running.Go(func() { st.read(first) })
	select {
	case <-first:
		return st, nil
	case <-st.ended:
		err = st.err
	case <-ctx.Done():
		err = ctx.Err()
	}
	_ = st.conn.Close()
	st.running.Wait()
	return nil, fmt.Errorf("stream %s: no answer: %w", st, err)
}

// String is "FROM → TO:PORT".
func (st *Stream) String() string { return fmt.Sprintf("%s → %s:%d", st.From, st.To, st.Addr.Port()) }

// Ended is closed when the client has learned of the end of the connection.
func (st *Stream) Ended() <-chan struct{} { return st.ended }

// End tells when the connection ended, and why; it is for after Ended.
func (st *Stream) End() (time.Time, error) { return st.at, st.err }

// Lines is how many have come back so far.
func (st *Stream) Lines() uint64 { return st.answered.Load() }

// Flowing waits until another line has come back, or says why none does.
func (st *Stream) Flowing(ctx context.Context) error {
	for was := st.Lines(); st.Lines() == was; {
		select {
		case <-st.ended:
			return fmt.Errorf("stream %s has ended: %w", st, st.err)
		case <-ctx.Done():
			return fmt.Errorf("stream %s stands still: %w", st, ctx.Err())
		case <-time.After(streamPace):
		}
	}
	return nil
}

// Close ends the stream in good order and returns how many lines were sent; an error if not all of them came back.
func (st *Stream) Close(ctx context.Context) (uint64, error) {
	st.closing.Store(true)
	defer context.AfterFunc(ctx, func() { _ = st.conn.Close() })()
	st.running.Wait()
	_ = st.conn.Close()
	sent, answered := st.sent.Load(), st.answered.Load()
	if st.err != nil || sent != answered {
		return sent, fmt.Errorf("stream %s: of %d lines %d came back: %w", st, sent, answered, st.err)
	}
	return sent, nil
}

func (st *Stream) write() {
	for n := uint64(1); !st.closing.Load(); n++ {
		if _, err := st.conn.Write(strconv.AppendUint(nil, n, 10)); err != nil {
			return // the reader learns of it too
		}
		if _, err := st.conn.Write([]byte("\n")); err != nil {
			return
		}
		st.sent.Store(n)
		select {
		case <-st.ended:
			return
		case <-time.After(streamPace):
		}
	}
	_ = st.conn.(*net.TCPConn).CloseWrite()
}

var errCut = errors.New("the other end closed it")

func (st *Stream) read(first chan struct{}) {
	st.err = st.check(first)
	st.at = time.Now()
	close(st.ended)
}

// check reads answers until the connection ends. After Close, with all answers there, that is good order.
func (st *Stream) check(first chan struct{}) error {
	lines := bufio.NewReader(st.conn)
	for {
		line, err := lines.ReadBytes('\n')
		switch {
		case err != nil && st.closing.Load() && len(line) == 0:
			return nil
		case err != nil && err.Error() != "EOF":
			return err
		case err != nil:
			return errCut
		}
		var a netns.Answer
		if err := json.Unmarshal(line, &a); err != nil {
			return fmt.Errorf("an answer that is none: %.60q", line)
		}
		if a.Nonce == "" { // a greeting
			continue
		}
		if want := st.answered.Load() + 1; a.Nonce != strconv.FormatUint(want, 10) {
			return fmt.Errorf("line %s came where %d should", a.Nonce, want)
		}
		if st.answered.Add(1) == 1 {
			close(first)
		}
	}
}

// Replaced reports whether one of the stream's pods is another one now, or gone.
func (s *Sandbox) Replaced(st *Stream) bool {
	return s.pods[st.From] != st.from || s.pods[st.To] != st.to
}

// Allowed is what the evaluator says of the stream now.
func (s *Sandbox) Allowed(st *Stream) bool {
	return s.index.Answer(st.From, verdict.TCP, st.Addr).Allowed
}

// Revocation returns what the sidecar that cut a stream wrote down of it, and whose sidecar it was.
func (s *Sandbox) Revocation(ctx context.Context, st *Stream) (by string, r flows.Record, err error) {
	client := unmap(st.conn.LocalAddr().(*net.TCPAddr).AddrPort())
	id := s.index.Subject(st.From).ID.String()
	is := func(r *flows.Record) bool {
		return unmap(r.Source) == client || r.Peer == id && unmap(r.Destination) == st.Addr && r.Time.After(st.Opened.Add(-time.Second))
	}
	for {
		for _, p := range []*pod{st.to, st.from} {
			if p.agent == nil {
				continue
			}
			if r, ok := p.agent.flows.findRevoked(is); ok {
				return p.name, r, nil
			}
		}
		select {
		case <-time.After(streamPace):
		case <-ctx.Done():
			return "", r, fmt.Errorf("stream %s: no sidecar says that it cut it: %w", st, ctx.Err())
		}
	}
}
