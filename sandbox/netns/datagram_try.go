package netns

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// datagramsInFlight is how many UDP targets one Probe tries at a time. One that is denied is silent for its whole time, so that the
	// more wait together, the sooner a matrix is done.
	datagramsInFlight = 256
	// datagramsSent bounds how often a datagram is sent while there is no answer: at 0, 1/4 and 2/4 of the time. The links here lose
	// nothing; what can lose is a full socket, or a connection-tracking table of the machine that others have filled. Three in a row
	// lost to that is no accident any more.
	datagramsSent = 3
	// datagramStart begins each probe's datagram, so that no server ever answers an answer.
	datagramStart = "mantlet-probe "
	// longestNonce fits in every path's MTU with all the rest.
	longestNonce = 256
)

func (t Target) checkDatagrams() error {
	switch p := t.Protocol.orTCP(); {
	case p == TCP:
		return nil
	case p != UDP:
		return errors.New("only TCP and UDP can be tried")
	case t.Speaks != ClientFirst:
		return errors.New("a UDP server cannot speak first")
	case t.Hold != 0:
		return errors.New("UDP has nothing to hold")
	case t.Nonce == "" || len(t.Nonce) > longestNonce || strings.ContainsAny(t.Nonce, "\r\n"):
		return errors.New("give datagrams a nonce of one line")
	}
	return nil
}

// tryDatagram sends the nonce and waits for the answer to it. The socket is connected: the kernel gives it nothing but what comes from
// the very address that was asked, and the errors that ICMP reports of it.
//
//	Err ""            answered
//	Err TimedOut      silence: the datagram, or its answer, was dropped
//	Err NotPermitted  the sender's own packet filter refused it
//	Err Refused, …    somebody on the way, or at the end, said so by ICMP
func tryDatagram(ctx context.Context, t Target, timeout time.Duration) (o Outcome) {
	o.Target = t
	if t.Timeout > 0 {
		timeout = t.Timeout
	}
	start := time.Now()
	defer func() { o.Elapsed = time.Since(start) }()
	dialer := net.Dialer{Control: hearAll}
	if t.From.IsValid() {
		dialer.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(t.From, 0))
	}
	conn, err := dialer.DialContext(ctx, "udp", t.Addr.String())
	if err != nil {
		o.Connect = errorText(ctx, err)
		return o
	}
	defer func() { _ = conn.Close() }()
	o.Connect = Connected
	for sent := range datagramsSent {
		if _, err := conn.Write([]byte(datagramStart + t.Nonce)); err != nil {
			o.Err = errorText(ctx, err)
			return o
		}
		until := start.Add(timeout * time.Duration(sent+1) / (datagramsSent + 1))
		if sent == datagramsSent-1 {
			until = start.Add(timeout)
		}
		if o.listen(ctx, conn, until); o.Err != TimedOut {
			return o
		}
	}
	return o
}

// hearAll is freeSource for datagrams, and has the socket told also of those ICMP errors that TCP would take for passing ones: that there is
// no such host, for example.
func hearAll(network, address string, raw syscall.RawConn) error {
	if err := freeSource(network, address, raw); err != nil {
		return err
	}
	var failed error
	err := raw.Control(func(fd uintptr) {
		if network == "udp4" {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_RECVERR, 1)
		} else {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVERR, 1)
		}
	})
	return errors.Join(err, failed)
}

// listen waits until a time for the answer to the nonce.
func (o *Outcome) listen(ctx context.Context, conn net.Conn, until time.Time) {
	_ = conn.SetReadDeadline(until)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buffer := make([]byte, longestAnswer)
	for {
		n, err := conn.Read(buffer)
		if err != nil {
			o.Err = errorText(ctx, err)
			return
		}
		line := bytes.TrimSpace(buffer[:n])
		var a Answer
		if json.Unmarshal(line, &a) == nil && a.Nonce != o.Target.Nonce {
			continue // to somebody who had this source port before
		}
		o.Err, o.Bytes = "", n
		o.take(line)
		return
	}
}
