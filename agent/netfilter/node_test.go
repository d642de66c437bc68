package netfilter

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/verdict"
)

var (
	nodeAddrs = []netip.Addr{podtest.OutsideIPv4, podtest.OutsideIPv6}
	// Another peer in the same network.
	peerAddrs = []netip.Addr{netip.MustParseAddr("10.99.0.7"), netip.MustParseAddr("fd99::7")}
)

// neighbour gives the outside the peer's addresses beside the node's.
func neighbour(t *testing.T, outside *podtest.Outside) {
	t.Helper()
	outside.Do(func() {
		link, err := netlink.LinkByName("peer0")
		if err != nil {
			t.Error(err)
			return
		}
		for _, a := range peerAddrs {
			ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen()-8, a.BitLen())}
			if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}); err != nil {
				t.Error(err)
			}
		}
	})
}

// from reaches a port of the pod from an address outside, in its family.
func from(t *testing.T, outside *podtest.Outside, source netip.Addr, sourcePort int, port uint16) (got string) {
	t.Helper()
	to := podtest.PodIPv4
	if source.Is6() {
		to = podtest.PodIPv6
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: source.AsSlice(), Port: sourcePort}}
	outside.Do(func() { got = reach(t, d, netip.AddrPortFrom(to, port).String()) })
	return got
}

func setNode(t *testing.T, r *Redirect, addrs ...netip.Addr) {
	t.Helper()
	if err := r.SetNode(&verdict.Network{Node: addrs}); err != nil {
		t.Fatal(err)
	}
	if err := r.Check(); err != nil {
		t.Errorf("the table is not what was written: %v", err)
	}
}

// TestOwnNodeIsDirect: the node sees what the app does, a closed port as closed, as soon as and as long as its addresses are known. Nobody
// else does, and Envoy's ports are nobody's.
func TestOwnNodeIsDirect(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	neighbour(t, outside)
	listen(t, "[::]:8080", "app")
	listen(t, "[::]:15006", "captured")
	listen(t, "[::]:15001", "outbound")
	r := apply(t)
	want := func(when string, sources []netip.Addr, open, closed string) {
		t.Helper()
		for _, source := range sources {
			for port, word := range map[uint16]string{8080: open, 9: closed, 15006: "captured", 15001: "captured"} {
				if got := from(t, outside, source, 0, port); got != word {
					t.Errorf("%s: from %s to port %d: %q, not %q", when, source, port, got, word)
				}
			}
		}
	}
	want("before its addresses are known", append(nodeAddrs, peerAddrs...), "captured", "captured")
	setNode(t, r, nodeAddrs...)
	want("the node", nodeAddrs, "app", "refused")
	want("another", peerAddrs, "captured", "captured")
	if err := r.Apply(); err != nil { // as a repair does
		t.Fatal(err)
	}
	want("the node after a repair", nodeAddrs, "app", "refused")
	setNode(t, r, netip.MustParseAddr("::ffff:10.99.0.1")) // the other family's address is gone, this one is written another way
	want("the node that is left", nodeAddrs[:1], "app", "refused")
	want("the node's former address", nodeAddrs[1:], "captured", "captured")
	setNode(t, r, peerAddrs...)
	want("the node's former addresses", nodeAddrs, "captured", "captured")
	want("the node's new ones", peerAddrs, "app", "refused")
	setNode(t, r)
	want("no address", append(nodeAddrs, peerAddrs...), "captured", "captured")
}

// TestFormerNodeIsCut: what came past the redirect from an address that is not the node's any more ends, also where another agent let it
// through. What is the node's lives on, and so does what is redirected.
func TestFormerNodeIsCut(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	neighbour(t, outside)
	for _, address := range []string{"[::]:8080", "[::]:15006"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		var conns sync.WaitGroup
		conns.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				hangup := context.AfterFunc(t.Context(), func() { _ = c.Close() }) // nobody tells the app of a connection that was cut while it says nothing
				conns.Go(func() { _, _ = io.Copy(c, c); hangup(); _ = c.Close() })
			}
		})
		t.Cleanup(conns.Wait)
		t.Cleanup(func() { _ = l.Close() })
	}
	open := func(source netip.Addr) (c net.Conn) {
		t.Helper()
		to := podtest.PodIPv4
		if source.Is6() {
			to = podtest.PodIPv6
		}
		var err error
		outside.Do(func() {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: source.AsSlice()}, Timeout: 5 * time.Second}
			c, err = d.Dial("tcp", netip.AddrPortFrom(to, 8080).String())
		})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	lives := func(c net.Conn) bool {
		t.Helper()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 4)
		_, err := io.WriteString(c, "ping")
		if err == nil {
			_, err = io.ReadFull(c, buf)
		}
		if ne, ok := err.(net.Error); ok && ne.Timeout() { //nolint:errorlint // as the connection says it
			t.Fatal("neither an echo nor a reset")
		}
		return err == nil && string(buf) == "ping"
	}
	both := append(nodeAddrs[:2:2], peerAddrs...)
	for _, restarted := range []string{"the same agent", "another agent"} {
		r := apply(t)
		setNode(t, r, nodeAddrs...)
		var direct, captured []net.Conn
		for _, a := range nodeAddrs {
			direct = append(direct, open(a))
		}
		for _, a := range peerAddrs {
			captured = append(captured, open(a))
		}
		setNode(t, r, both...)
		if restarted == "another agent" {
			r = apply(t)
		}
		for _, c := range append(direct, captured...) {
			if !lives(c) {
				t.Fatalf("%s: from %s: cut while its address did not change", restarted, c.LocalAddr())
			}
		}
		setNode(t, r, append(peerAddrs, nodeAddrs[0])...)
		if !lives(direct[0]) {
			t.Errorf("%s: the connection of an address that is still the node's was cut", restarted)
		}
		if lives(direct[1]) {
			t.Errorf("%s: the connection of a former address of the node lives", restarted)
		}
		for _, c := range captured {
			if !lives(c) {
				t.Errorf("%s: from %s: a redirected connection was cut", restarted, c.LocalAddr())
			}
		}
	}
}

// TestNodePortIsNoReply: a segment with the node's address and a node port as its source, or the port of a service that has this address for an external
// one, which somebody else may have forged, begins no entry that lets the app's own SYN to that port pass as a reply. Resets are dropped here so that the moment lasts.
func TestNodePortIsNoReply(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	greet(t, outside.Listen(t, "[::]:30080"), "node port")
	greet(t, outside.Listen(t, "[::]:80"), "service")
	listen(t, "[::]:15001", "captured")
	r := apply(t)
	n := &verdict.Network{Node: nodeAddrs, Services: []netip.AddrPort{netip.MustParseAddrPort("10.99.0.1:80"), netip.MustParseAddrPort("192.0.2.1:81")}}
	if err := errors.Join(r.SetNode(n), r.Check()); err != nil {
		t.Fatal(err)
	}
	if len(r.cfg.Services) != 1 {
		t.Errorf("services %v: one is at the node", r.cfg.Services)
	}
	dropResets(t)
	for i, port := range []uint16{30080, 80} {
		at := netip.AddrPortFrom(nodeAddrs[0], port)
		for j, flags := range []byte{flagSYN, flagACK} {
			local := netip.AddrPortFrom(podtest.PodIPv4, uint16(4000+2*i+j))
			outside.Do(func() { sendTCP(t, at, local, flags) })
			d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(local)}
			if got := reach(t, d, at.String()); got != "captured" {
				t.Errorf("behind a segment of %s with flags %#x: %q, not captured", at, flags, got)
			}
		}
	}
}
