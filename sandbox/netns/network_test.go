package netns_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mantlet/mantlet/sandbox/netns"
)

func TestMain(m *testing.M) {
	playRole()
	netns.TestMain(m)
}

// testNetwork opens a network for a test; at the end it must close without an error and leave no goroutine.
func testNetwork(t *testing.T, c netns.Config) *netns.Network {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	if c.Logger == nil {
		c.Logger = slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	n, err := netns.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		goleak.VerifyNone(t, leaks)
	})
	return n
}

func testPods(t *testing.T, n *netns.Network, count int, ports ...netns.Port) []*netns.Pod {
	t.Helper()
	specs := make([]netns.PodSpec, count)
	for i := range specs {
		specs[i] = netns.PodSpec{Namespace: "test", Name: fmt.Sprintf("pod-%d", i), Ports: ports, IPs: []netip.Addr{
			netip.AddrFrom4([4]byte{10, 64, byte(1 + i/250), byte(1 + i%250)}),
			netip.MustParseAddr(fmt.Sprintf("fd00:10:64::1:%x", 1+i)),
		}}
	}
	pods, err := n.AddPods(t.Context(), specs)
	if err != nil {
		t.Fatal(err)
	}
	return pods
}

// prober is a pod, an outside or the node.
type prober interface {
	Probe(context.Context, []netns.Target) ([]netns.Outcome, error)
}

func probe(t *testing.T, from prober, targets ...netns.Target) []netns.Outcome {
	t.Helper()
	for i := range targets {
		if targets[i].Nonce == "" {
			targets[i].Nonce = fmt.Sprintf("n%d", i)
		}
	}
	outcomes, err := from.Probe(t.Context(), targets)
	if err != nil {
		t.Fatal(err)
	}
	return outcomes
}

func at(address string, port uint16, speaks netns.Speaks) netns.Target {
	return netns.Target{Addr: netip.AddrPortFrom(netip.MustParseAddr(address), port), Speaks: speaks}
}

// wantReached checks that an outcome is a whole exchange with that server.
func wantReached(t *testing.T, o netns.Outcome, server string, client netip.Addr) {
	t.Helper()
	if o.Connect != netns.Connected || o.Err != "" || o.Reached != server || o.Bytes == 0 || o.Seen.Addr() != client {
		t.Errorf("%s: got %+v, want an answer of %s to %s", o.Target.Addr, o, server, client)
	}
}

func TestPodsReachEachOther(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pods := testPods(t, n, 3, netns.Port{Number: 8080, Speaks: netns.ClientFirst}, netns.Port{Number: 25, Speaks: netns.ServerFirst})
	node4, node6 := n.Addresses()
	for i, from := range pods {
		for _, to := range pods { // a pod to itself too
			for k, ip := range to.Spec().IPs {
				out := probe(t, from, netns.Target{Addr: netip.AddrPortFrom(ip, 8080), Speaks: netns.ClientFirst}, netns.Target{Addr: netip.AddrPortFrom(ip, 25), Speaks: netns.ServerFirst})
				wantReached(t, out[0], to.Name()+":8080", from.Spec().IPs[k])
				wantReached(t, out[1], to.Name()+":25", from.Spec().IPs[k])
			}
		}
		out := probe(t, n, at(pods[i].Spec().IPs[0].String(), 8080, netns.ClientFirst), at(pods[i].Spec().IPs[1].String(), 25, netns.ServerFirst))
		wantReached(t, out[0], from.Name()+":8080", node4)
		wantReached(t, out[1], from.Name()+":25", node6)
	}

	got, err := pods[0].Connections(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var want []netns.Connections
	for _, port := range []uint16{25, 8080} {
		from := []netip.Addr{node4}
		if port == 25 {
			from = []netip.Addr{node6}
		}
		for _, p := range pods {
			from = append(from, p.Spec().IPs...)
		}
		slices.SortFunc(from, netip.Addr.Compare)
		for _, a := range from {
			want = append(want, netns.Connections{Port: port, From: a, Count: 1})
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s counted %v, want %v", pods[0].Name(), got, want)
	}
}

// TestRefusedResetClosedAndTimeoutDiffer holds each way in which a try fails apart from the others.
func TestRefusedResetClosedAndTimeoutDiffer(t *testing.T) {
	const short = 300 * time.Millisecond
	n := testNetwork(t, netns.Config{ProbeTimeout: time.Minute})
	within := func(d time.Duration, t netns.Target) netns.Target {
		t.Timeout = d
		return t
	}
	pods := testPods(t, n, 2, netns.Port{Number: 8080, Speaks: netns.ClientFirst}, netns.Port{Number: 9090, Speaks: netns.ClientFirst, Bind: netip.MustParseAddr("127.0.0.1")})
	other := pods[1]
	rude := startRude(t, other)
	for _, ip := range other.Spec().IPs {
		address := ip.String()
		for _, c := range []struct {
			name    string
			target  netns.Target
			connect string
			err     string
			bytes   int
		}{
			{"nobody listens", at(address, 81, netns.ClientFirst), netns.Refused, "", 0},
			{"listens on 127.0.0.1 only", at(address, 9090, netns.ClientFirst), netns.Refused, "", 0},
			{"both wait for the other's first byte", within(2*time.Second, at(address, 8080, netns.ServerFirst)), netns.Connected, netns.TimedOut, 0},
			{"closes at once", at(address, rude.closing, netns.ServerFirst), netns.Connected, netns.Closed, 0},
			{"closes within the answer", at(address, rude.cutting, netns.ServerFirst), netns.Connected, netns.Closed, 3},
			{"resets", at(address, rude.resetting, netns.ClientFirst), netns.Connected, netns.Reset, 0},
			{"packets vanish", within(short, at(address, rude.vanishing, netns.ClientFirst)), netns.TimedOut, "", 0},
		} {
			t.Run(c.name+"/"+address, func(t *testing.T) {
				o := probe(t, pods[0], c.target)[0]
				if o.Connect != c.connect || o.Err != c.err || o.Bytes != c.bytes || o.Reached != "" || o.Seen.IsValid() {
					t.Errorf("got %+v, want connect %q, error %q, %d bytes", o, c.connect, c.err, c.bytes)
				}
			})
		}
	}
	for _, nowhere := range []string{"10.64.99.99", "fd00:10:64::99"} {
		for _, from := range []prober{pods[0], n} {
			// For IPv6 this takes a second: the kernel heeds the ICMPv6 message only when it sends its second SYN.
			if o := probe(t, from, at(nowhere, 80, netns.ClientFirst))[0]; o.Connect != "no route to host" {
				t.Errorf("to an address that nobody has, from %T: %+v", from, o)
			}
		}
	}
	// What is held open is noticed when it is cut.
	out := probe(t, pods[0],
		netns.Target{Addr: netip.AddrPortFrom(other.Spec().IPs[0], 8080), Speaks: netns.ClientFirst, Hold: short},
		netns.Target{Addr: netip.AddrPortFrom(other.Spec().IPs[0], rude.answering), Speaks: netns.ServerFirst, Hold: time.Hour})
	wantReached(t, out[0], "test/pod-1:8080", pods[0].Spec().IPs[0])
	if out[0].Elapsed < short {
		t.Errorf("held open for %s only", out[0].Elapsed)
	}
	if out[1].Err != netns.Closed || out[1].Reached == "" {
		t.Errorf("cut while held: %+v", out[1])
	}
}

func TestProbeEndsWithItsContext(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pods := testPods(t, n, 1, netns.Port{Number: 8080, Speaks: netns.ClientFirst})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := pods[0].Probe(ctx, []netns.Target{{Addr: netip.AddrPortFrom(pods[0].Spec().IPs[0], 8080), Speaks: netns.ServerFirst, Timeout: time.Hour}})
		ended <- err
	}()
	for seen := 0; seen == 0; { // until it is connected
		c, err := pods[0].Connections(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		seen = len(c)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	wantReached(t, probe(t, pods[0], at(pods[0].Spec().IPs[0].String(), 8080, netns.ClientFirst))[0], "test/pod-0:8080", pods[0].Spec().IPs[0])
}

func TestOutsideAnswersForEveryAddressAndProbesInwards(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	ports := []netns.Port{{Number: 443, Speaks: netns.ClientFirst}, {Number: 25, Speaks: netns.ServerFirst}}
	pods := testPods(t, n, 1, ports...)
	mine := pods[0].Spec().IPs
	var outside []*netns.External
	for _, cidr := range []string{"203.0.113.0/24", "2001:db8::/32", "0.0.0.0/0", "::/0", "198.51.100.7/32"} {
		e, err := n.AddExternal(t.Context(), netns.ExternalSpec{Prefix: netip.MustParsePrefix(cidr), Ports: ports})
		if err != nil {
			t.Fatal(err)
		}
		outside = append(outside, e)
	}
	for _, c := range []struct{ address, by string }{
		{"203.0.113.1", "203.0.113.0/24"}, {"203.0.113.250", "203.0.113.0/24"}, {"198.51.100.7", "198.51.100.7/32"},
		{"8.8.8.8", "0.0.0.0/0"}, {"10.64.200.1", "0.0.0.0/0"},
		{"2001:db8::1", "2001:db8::/32"}, {"2001:db8:1:2:3:4:5:6", "2001:db8::/32"}, {"2a00::1", "::/0"},
	} {
		from := mine[0]
		if netip.MustParseAddr(c.address).Is6() {
			from = mine[1]
		}
		out := probe(t, pods[0], at(c.address, 443, netns.ClientFirst), at(c.address, 25, netns.ServerFirst))
		wantReached(t, out[0], c.by+":443", from)
		wantReached(t, out[1], c.by+":25", from)
	}
	for _, c := range []struct {
		outside, to int
		from, seen  string
	}{{0, 0, "", "203.0.113.1"}, {0, 0, "203.0.113.99", "203.0.113.99"}, {1, 1, "2001:db8::77", "2001:db8::77"}, {2, 0, "9.9.9.9", "9.9.9.9"}, {3, 1, "2a00::7", "2a00::7"}} {
		target := netns.Target{Addr: netip.AddrPortFrom(mine[c.to], 443), Speaks: netns.ClientFirst}
		if c.from != "" {
			target.From = netip.MustParseAddr(c.from)
		}
		wantReached(t, probe(t, outside[c.outside], target)[0], "test/pod-0:443", netip.MustParseAddr(c.seen))
	}
}

func TestAHostMadeInVainLeavesNothing(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	good := netns.PodSpec{Namespace: "a", Name: "b", IPs: []netip.Addr{netip.MustParseAddr("10.64.0.9")}}
	bad := func(change func(*netns.PodSpec)) netns.PodSpec { s := good; s.Ports = nil; change(&s); return s }
	for name, spec := range map[string]netns.PodSpec{
		"no name":            bad(func(s *netns.PodSpec) { s.Name = "" }),
		"no address":         bad(func(s *netns.PodSpec) { s.IPs = nil }),
		"the node's address": bad(func(s *netns.PodSpec) { s.IPs = []netip.Addr{netip.MustParseAddr("10.64.0.1")} }),
		"loopback":           bad(func(s *netns.PodSpec) { s.IPs = []netip.Addr{netip.MustParseAddr("127.0.0.1")} }),
		"port 0":             bad(func(s *netns.PodSpec) { s.Ports = []netns.Port{{Speaks: netns.ClientFirst}} }),
		"nobody speaks":      bad(func(s *netns.PodSpec) { s.Ports = []netns.Port{{Number: 1}} }),
		"cannot listen": bad(func(s *netns.PodSpec) {
			s.Ports = []netns.Port{{Number: 1, Speaks: netns.ClientFirst, Bind: netip.MustParseAddr("192.0.2.1")}}
		}),
		"second address taken": bad(func(s *netns.PodSpec) { s.IPs = append(s.IPs, netip.MustParseAddr("10.64.0.1")) }),
	} {
		if p, err := n.AddPod(t.Context(), spec); err == nil {
			t.Errorf("%s: got %v, want an error", name, p.Name())
		}
		links := linkNames(t)
		if len(links) != 3 { // lo, void0, void1
			t.Errorf("%s: links %v are left", name, links)
		}
	}
	p, err := n.AddPod(t.Context(), good) // neither name nor address stayed taken
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.AddPod(t.Context(), good); err == nil {
		t.Error("a second pod of the same name")
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	if _, err := n.AddPod(t.Context(), good); err != nil {
		t.Errorf("once more after Close: %v", err)
	}
	if _, err := netns.New(netns.Config{}); err == nil {
		t.Error("a second network in one process")
	}
}
