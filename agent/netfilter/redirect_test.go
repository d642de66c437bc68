package netfilter

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables/expr"
	"go.uber.org/goleak"

	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

func TestMain(m *testing.M) { os.Exit(podtest.Main(m)) }

// proxy is a user that the tests can be: under one mapped user only root.
func proxy() proxyuser.User {
	if podtest.SingleUser() {
		return proxyuser.User{}
	}
	return proxyuser.Pod.User(proxyuser.Seed{7: 1, 15: 2})
}

// nobody is a user that the tests are not.
var nobody = proxyuser.Pod.User(proxyuser.Seed{7: 3, 15: 4})

// apply writes the table with the given exempt users and removes it after the test.
func apply(t *testing.T, users ...proxyuser.User) *Redirect {
	t.Helper()
	cfg := ByMark()
	cfg.Users = users
	r, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Apply(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Remove(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// greet listens and greets whoever connects with word and the destination that it sees, until the test ends.
func greet(t *testing.T, l net.Listener, word string) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, word)
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
}

func listen(t *testing.T, address, word string) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	greet(t, l, word)
}

// reach dials and returns the greeting, or "refused".
func reach(t *testing.T, d net.Dialer, address string) string {
	t.Helper()
	d.Timeout = 5 * time.Second
	c, err := d.Dial("tcp", address)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return "refused"
	}
	if err != nil {
		t.Fatalf("dial %s: %v", address, err)
	}
	defer c.Close()
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("read from %s: %v", address, err)
	}
	return string(b)
}

func TestOutboundIsCaptured(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	greet(t, outside.Listen(t, "[::]:8080"), "outside")
	targets := []string{"10.99.0.1:8080", "[fd99::1]:8080"}
	app := func(target string) string { return reach(t, net.Dialer{}, target) }
	for _, target := range targets {
		if got := app(target); got != "outside" {
			t.Fatalf("%s without a redirect: %q", target, got)
		}
	}
	apply(t, nobody)
	for _, target := range targets {
		if got := app(target); got != "refused" {
			t.Errorf("%s while nobody listens on the capture port: %q, not refused", target, got)
		}
	}
	listen(t, "[::]:15001", "captured")
	for _, target := range targets {
		if got := app(target); got != "captured" {
			t.Errorf("%s: %q, not captured", target, got)
		}
	}
}

func TestInboundIsCaptured(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	listen(t, "[::]:8080", "app")
	apply(t)
	from := func(target string) (got string) {
		outside.Do(func() { got = reach(t, net.Dialer{}, target) })
		return got
	}
	targets := []string{"10.99.0.2:8080", "[fd99::2]:8080"}
	for _, target := range targets {
		if got := from(target); got != "refused" {
			t.Errorf("%s while nobody listens on the capture port: %q, not refused", target, got)
		}
	}
	listen(t, "[::]:15006", "captured")
	for _, target := range append(targets, "10.99.0.2:9", "[fd99::2]:9") {
		if got := from(target); got != "captured" {
			t.Errorf("%s: %q, not captured", target, got)
		}
	}
}

func TestExemption(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	greet(t, outside.Listen(t, "[::]:8080"), "outside")
	listen(t, "[::]:15001", "captured")
	targets := []string{"10.99.0.1:8080", "[fd99::1]:8080"}
	asProxy := func(target string) (got string) {
		podtest.As(int(proxy().UID), int(proxy().GID), func() { got = reach(t, net.Dialer{}, target) })
		return got
	}
	marked := func(target string) string { return reach(t, net.Dialer{Control: Exempt}, target) }
	app := func(target string) string { return reach(t, net.Dialer{}, target) }

	for _, target := range targets {
		apply(t, proxy())
		if got := asProxy(target); got != "outside" {
			t.Errorf("%s as the exempt user: %q", target, got)
		}
		if got := marked(target); got != "outside" {
			t.Errorf("%s with the mark: %q", target, got)
		}
		if !podtest.SingleUser() {
			if got := app(target); got != "captured" {
				t.Errorf("%s as another user: %q", target, got)
			}
			u := proxy()
			for _, other := range []proxyuser.User{
				{UID: u.UID, GID: 0}, {UID: 0, GID: u.GID}, {UID: u.UID, GID: u.UID}, {UID: u.UID + 1, GID: u.GID}, {UID: u.UID, GID: u.GID + 1},
				{UID: 15150, GID: 15150}, nobody,
			} {
				podtest.As(int(other.UID), int(other.GID), func() {
					if got := app(target); got != "captured" {
						t.Errorf("%s as %s, where %s is exempt: %q", target, other, u, got)
					}
				})
			}
		}
		apply(t) // no user is exempt
		if got := asProxy(target); got != "captured" {
			t.Errorf("%s as the proxy's user, with exemption by mark only: %q", target, got)
		}
		if got := marked(target); got != "outside" {
			t.Errorf("%s with the mark, with exemption by mark only: %q", target, got)
		}
		other := net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
			var err error
			_ = c.Control(func(fd uintptr) {
				err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_MARK, names.ProxyMark|1<<16)
			})
			return err
		}}
		if got := reach(t, other, target); got != "captured" {
			t.Errorf("%s with another mark: %q", target, got)
		}
	}
}

func TestDialPassesTheRedirect(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	greet(t, outside.Listen(t, "[::]:8080"), "outside")
	apply(t)
	c, err := Dial(t.Context(), "tcp", "10.99.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, _ := io.ReadAll(c); string(b) != "outside" {
		t.Errorf("got %q", b)
	}
}

// A pod always reaches itself: over loopback and by its own addresses.
func TestSelfIsDirect(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	podtest.Connect(t)
	listen(t, "[::]:8080", "app")
	listen(t, "[::]:15001", "captured")
	listen(t, "[::]:15006", "captured")
	apply(t, nobody)
	for _, target := range []string{"127.0.0.1:8080", "[::1]:8080", "10.99.0.2:8080", "[fd99::2]:8080"} {
		if got := reach(t, net.Dialer{}, target); got != "app" {
			t.Errorf("%s: %q, not the app itself", target, got)
		}
	}
}

// UDP is not this table's affair.
func TestOnlyTCPIsCaptured(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	var there net.PacketConn
	var err error
	outside.Do(func() { there, err = net.ListenPacket("udp", "10.99.0.1:8080") })
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()
	apply(t)
	here, err := net.Dial("udp", "10.99.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	if _, err := io.WriteString(here, "ping"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	_ = there.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, from, err := there.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "ping" {
		t.Fatalf("outside got %q, %v", buf[:n], err)
	}
	if _, err := there.WriteTo([]byte("pong"), from); err != nil {
		t.Fatal(err)
	}
	_ = here.SetReadDeadline(time.Now().Add(5 * time.Second))
	if n, err := here.Read(buf); err != nil || string(buf[:n]) != "pong" {
		t.Fatalf("pod got %q, %v", buf[:n], err)
	}
}

// Writing the table again leaves open connections alone, captured and exempt ones alike.
func TestApplyAgainKeepsConnections(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	r := apply(t)
	echo := func(l net.Listener) {
		var wg sync.WaitGroup
		wg.Go(func() {
			c, err := l.Accept()
			if err == nil {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}
		})
		t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	}
	capture, err := net.Listen("tcp", "[::]:15001")
	if err != nil {
		t.Fatal(err)
	}
	echo(capture)
	echo(outside.Listen(t, "10.99.0.1:8080"))
	say := func(c net.Conn) {
		t.Helper()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		buf := make([]byte, 4)
		if _, err := io.WriteString(c, "ping"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil || string(buf) != "ping" {
			t.Fatalf("echo: %q, %v", buf, err)
		}
	}
	captured, err := net.Dial("tcp", "10.99.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer captured.Close()
	exempt, err := Dial(t.Context(), "tcp", "10.99.0.1:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer exempt.Close()
	say(captured)
	say(exempt)
	for range 3 {
		if err := r.Apply(); err != nil {
			t.Fatal(err)
		}
		say(captured)
		say(exempt)
	}
}

// A lone ACK begins a conntrack entry as well. If it were not redirected, a SYN that comes before the kernel's reset has ended the entry
// would share it and reach the app. To make that moment last, resets are dropped here before conntrack sees them.
func TestAckFirstDoesNotOpenAWay(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	outside := podtest.Connect(t)
	listen(t, "10.99.0.2:8080", "app")
	listen(t, "[::]:15006", "captured")
	apply(t)
	dropResets(t)
	outside.Do(func() {
		sendTCP(t, netip.MustParseAddrPort("10.99.0.1:4000"), netip.MustParseAddrPort("10.99.0.2:8080"), flagACK)
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 99, 0, 1), Port: 4000}}
		if got := reach(t, d, "10.99.0.2:8080"); got != "captured" {
			t.Errorf("behind a lone ACK: %q, not captured", got)
		}
	})
}

// The kernel remembers whom the table exempts, whatever else it holds; a table that exempts otherwise says nothing.
func TestExempted(t *testing.T) {
	want := func(when string, want *proxyuser.User) {
		t.Helper()
		got, err := Exempted()
		if err != nil || (got == nil) != (want == nil) || got != nil && *got != *want {
			t.Errorf("%s: %v, %v, want %v", when, got, err, want)
		}
	}
	want("without a table", nil)
	apply(t)
	want("with exemption by mark only", nil)
	apply(t, nobody)
	want("with a user", &nobody)
	cfg := ByNode(nobody)
	cfg.Node = []netip.Addr{podtest.OutsideIPv4}
	r, err := New(cfg, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.Apply(); err != nil {
		t.Fatal(err)
	}
	want("in node mode, with the node's addresses", &nobody)
	by := func(e ...expr.Any) []expr.Any { return append(e, &expr.Verdict{Kind: expr.VerdictReturn}) }
	for what, rule := range map[string][]expr.Any{
		"the user alone":    by(Is(nobody)[:2]...),
		"the group alone":   by(Is(nobody)[2:]...),
		"another verdict":   append(Is(nobody), &expr.Verdict{Kind: expr.VerdictAccept}),
		"users and marks":   returnIf(expr.MetaKeyMARK, []byte{1, 2, 3, 4}),
		"groups for users":  by(append(Is(nobody)[2:], Is(nobody)[:2]...)...),
		"a third condition": by(append(Is(nobody), returnIf(expr.MetaKeyMARK, []byte{1, 2, 3, 4})[:2]...)...),
	} {
		if got, err := exempts(rule); got != nil || err != nil {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
}
