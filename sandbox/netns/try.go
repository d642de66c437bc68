package netns

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// tryAll tries targets, so many at a time of each protocol, from the network namespace of the process.
func tryAll(ctx context.Context, r *probeRequest) []Outcome {
	outcomes := make([]Outcome, len(r.Targets))
	var streams, datagrams []int
	for i, t := range r.Targets {
		if t.Protocol == UDP {
			datagrams = append(datagrams, i)
		} else {
			streams = append(streams, i)
		}
	}
	var both sync.WaitGroup
	both.Go(func() {
		each(streams, r.InFlight, func(i int) { outcomes[i] = try(ctx, r.Targets[i], r.Timeout) })
	})
	both.Go(func() {
		each(datagrams, datagramsInFlight, func(i int) { outcomes[i] = tryDatagram(ctx, r.Targets[i], r.Timeout) })
	})
	both.Wait()
	return outcomes
}

// each calls f of every index, so many at a time, and waits for all.
func each(indices []int, inFlight int, f func(int)) {
	next := make(chan int)
	var workers sync.WaitGroup
	for range min(inFlight, len(indices)) {
		workers.Go(func() {
			for i := range next {
				f(i)
			}
		})
	}
	for _, i := range indices {
		next <- i
	}
	close(next)
	workers.Wait()
}

// try connects, says its line if it has to, and waits for an answer.
func try(ctx context.Context, t Target, timeout time.Duration) (o Outcome) {
	o.Target = t
	if t.Timeout > 0 {
		timeout = t.Timeout
	}
	start := time.Now()
	defer func() { o.Elapsed = time.Since(start) }()
	deadline := start.Add(timeout)

	dialer := net.Dialer{Deadline: deadline, KeepAlive: -1, Control: freeSource}
	dialer.SetMultipathTCP(false)
	if t.From.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(t.From, 0))
	}
	conn, err := dialer.DialContext(ctx, "tcp", t.Addr.String())
	if err != nil {
		o.Connect = errorText(ctx, err)
		return o
	}
	defer func() { _ = conn.Close() }()
	o.Connect = Connected
	unblock := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer unblock()
	_ = conn.SetDeadline(deadline)

	if t.Speaks == ClientFirst {
		if _, err := io.WriteString(conn, t.Nonce+"\n"); err != nil {
			o.Err = errorText(ctx, err)
			return o
		}
	}
	line, err := readLine(conn, &o.Bytes)
	if err != nil {
		o.Err = errorText(ctx, err)
		return o
	}
	o.take(line)
	if o.Err == "" && t.Hold > 0 {
		o.Err = hold(ctx, conn, t.Hold)
	}
	return o
}

// take reads the server's answer.
func (o *Outcome) take(line []byte) {
	var a Answer
	if err := json.Unmarshal(line, &a); err != nil || a.Pod == "" {
		o.Err = fmt.Sprintf("the answer is not a probe server's: %.60q", line)
		return
	}
	o.Reached, o.Seen = a.Pod+":"+strconv.Itoa(int(a.Port)), a.Seen
	if want := o.Target.Nonce; o.Target.Speaks == ClientFirst && a.Nonce != want {
		o.Err = fmt.Sprintf("the answer is to %q, not to %q", a.Nonce, want)
	}
}

// hold waits with the connection open and returns what ended it early, or "".
func hold(ctx context.Context, conn net.Conn, d time.Duration) string {
	_ = conn.SetReadDeadline(time.Now().Add(d))
	if ctx.Err() != nil { // it ended before the new deadline was set, which then has replaced the past one
		return Canceled
	}
	var b [1]byte
	_, err := conn.Read(b[:])
	switch text := errorText(ctx, err); {
	case err == nil:
		return "more bytes after the answer"
	case text == TimedOut:
		return ""
	default:
		return text
	}
}

// longestAnswer is more than any probe server sends.
const longestAnswer = 4096

// readLine reads up to a newline and counts every byte that it got, also of a line that never ends.
func readLine(conn net.Conn, count *int) ([]byte, error) {
	buffer := make([]byte, longestAnswer)
	for *count < len(buffer) {
		n, err := conn.Read(buffer[*count:])
		*count += n
		if end := bytes.IndexByte(buffer[:*count], '\n'); end >= 0 {
			return buffer[:end], nil
		}
		if err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("more than %d bytes without a newline", longestAnswer)
}

// errorText shortens an error to what it comes down to.
func errorText(ctx context.Context, err error) string {
	var errno syscall.Errno
	var timeout interface{ Timeout() bool }
	switch {
	case err == nil:
		return ""
	case errors.Is(ctx.Err(), context.Canceled):
		return Canceled
	case errors.Is(err, io.EOF):
		return Closed
	case errors.As(err, &errno) && errno != syscall.ETIMEDOUT:
		return errno.Error()
	case errors.As(err, &timeout) && timeout.Timeout():
		return TimedOut
	}
	return err.Error()
}

// freeSource lets a socket be bound to an address that no interface has, which is how the outside has all addresses of a CIDR.
func freeSource(_, address string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
	})
	return errors.Join(err, failed)
}
