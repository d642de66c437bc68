package netfilter

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/mantlet/mantlet/agent/podtest"
)

// TestPortIsReusedAfterReset: conntrack remembers a connection that was reset for a while, and lets a new one from the same port take its
// way. So Envoy's own connection would be sent to Envoy where the app had one to the same place that Envoy has reset, and the app's would pass
// Envoy by where Envoy had one that the other end has reset.
func TestPortIsReusedAfterReset(t *testing.T) {
	outside := podtest.Connect(t)
	resets := func(l net.Listener) {
		greetWith(t, l, func(c *net.TCPConn) { _ = c.SetLinger(0) })
	}
	greet(t, outside.Listen(t, "[::]:8080"), "outside")
	resets(outside.Listen(t, "[::]:8081"))
	apply(t)
	for i, target := range []string{"10.99.0.1", "[fd99::1]"} {
		local := netip.MustParseAddr([]string{"10.99.0.2", "fd99::2"}[i])
		app := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(local, 40000))}
		exempt := app
		exempt.Control = Exempt

		l, err := net.Listen("tcp", "[::]:15001")
		if err != nil {
			t.Fatal(err)
		}
		resets(l)
		awaitReset(t, app, target+":8080")
		if got := reach(t, exempt, target+":8080"); got != "outside" {
			t.Errorf("%s: a connection that is exempt, from a port that the app had: %q", target, got)
		}
		l.Close()

		awaitReset(t, exempt, target+":8081")
		if got := reach(t, app, target+":8081"); got != "refused" {
			t.Errorf("%s: a connection of the app, from a port that an exempt one had, passes the redirect: %q", target, got)
		}
	}
}

// greetWith listens and does something to each connection before it closes it, until the test ends.
func greetWith(t *testing.T, l net.Listener, f func(*net.TCPConn)) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f(c.(*net.TCPConn))
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
}

// awaitReset connects and wants the other end to reset the connection.
func awaitReset(t *testing.T, d net.Dialer, address string) {
	t.Helper()
	d.Timeout = 5 * time.Second
	c, err := d.Dial("tcp", address)
	if err == nil {
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("%s was not reset: %v", address, err)
	}
}
