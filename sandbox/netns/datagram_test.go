package netns_test

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/sandbox/netns"
)

func udp(address netip.Addr, port uint16, nonce string) netns.Target {
	return netns.Target{Addr: netip.AddrPortFrom(address, port), Protocol: netns.UDP, Speaks: netns.ClientFirst, Nonce: nonce}
}

// arrivals asks a pod for its datagrams after a fence; none may be lost.
func arrivals(t *testing.T, n *netns.Network, of interface {
	Arrivals(context.Context) (*netns.Arrivals, error)
}) []netns.Arrival {
	t.Helper()
	if err := n.Fence(t.Context()); err != nil {
		t.Fatal(err)
	}
	got, err := of.Arrivals(t.Context())
	if err != nil || got.Lost != 0 {
		t.Fatalf("arrivals: %+v, %v", got, err)
	}
	return got.Datagrams
}

// TestDatagramsReachEachOther sends between pods that have several addresses of each family, through a Service, from the node and from
// outside: the answer comes from the very address that was asked, or the client would not hear it.
func TestDatagramsReachEachOther(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	ports := []netns.Port{{Number: 53, Protocol: netns.UDP, Speaks: netns.ClientFirst}, {Number: 53, Speaks: netns.ServerFirst}}
	var pods []*netns.Pod
	for i := range 3 {
		spec := netns.PodSpec{Namespace: "test", Name: fmt.Sprintf("pod-%d", i), Ports: ports}
		for k := range 2 {
			spec.IPs = append(spec.IPs, netip.AddrFrom4([4]byte{10, 64, byte(1 + k), byte(1 + i)}), netip.MustParseAddr(fmt.Sprintf("fd00:10:64::%x:%x", 1+k, 1+i)))
		}
		p, err := n.AddPod(t.Context(), spec)
		if err != nil {
			t.Fatal(err)
		}
		pods = append(pods, p)
	}
	for _, from := range pods {
		for _, to := range pods {
			var targets []netns.Target
			for _, ip := range to.Spec().IPs {
				targets = append(targets, udp(ip, 53, from.Name()+"-"+ip.String()))
			}
			for i, o := range probe(t, from, targets...) {
				targets[i].From = from.Spec().IPs[(i+2)%4] // the other one of the family
				wantReached(t, o, to.Name()+":53", o.Seen.Addr())
				if !slices.Contains(from.Spec().IPs, o.Seen.Addr()) {
					t.Errorf("%s is seen as %s", from.Name(), o.Seen)
				}
			}
			for _, o := range probe(t, from, targets...) {
				wantReached(t, o, to.Name()+":53", o.Target.From)
			}
		}
	}
	got := arrivals(t, n, pods[0])
	if len(got) != 24 || got[0].Port != 53 || !got[0].From.IsValid() || !strings.HasPrefix(got[0].Nonce, "test/pod-") {
		t.Errorf("pod-0 has %v, want eight datagrams of each pod", got)
	}
	if again := arrivals(t, n, pods[0]); len(again) != 0 {
		t.Errorf("and %v when asked again", again)
	}
	if c, err := pods[0].Connections(t.Context()); err != nil || len(c) != 0 {
		t.Errorf("datagrams count as connections: %v, %v", c, err)
	}

	node4, node6 := n.Addresses()
	for family, vip := range []string{"10.96.0.1", "fd00:10:96::1"} {
		at := netip.MustParseAddr(vip)
		err := n.SetServices([]netns.Service{{Addr: netip.AddrPortFrom(at, 530), Protocol: netns.UDP, Backends: []netip.AddrPort{
			netip.AddrPortFrom(pods[1].Spec().IPs[family], 53), netip.AddrPortFrom(pods[2].Spec().IPs[family+2], 53)}}})
		if err != nil {
			t.Fatal(err)
		}
		reached := map[string]int{}
		var targets []netns.Target
		for i := range 100 {
			targets = append(targets, udp(at, 530, fmt.Sprint(i)))
		}
		for _, o := range probe(t, pods[0], targets...) {
			reached[o.Reached]++
		}
		if reached["test/pod-1:53"] == 0 || reached["test/pod-2:53"] == 0 || len(reached) != 2 {
			t.Errorf("by the Service %s: %v", vip, reached)
		}
		wantReached(t, probe(t, n, udp(pods[0].Spec().IPs[family+2], 53, "from the node"))[0], "test/pod-0:53", []netip.Addr{node4, node6}[family])
	}

	for family, cidr := range []string{"203.0.113.0/24", "2001:db8:7::/64"} {
		prefix := netip.MustParsePrefix(cidr)
		outside, err := n.AddExternal(t.Context(), netns.ExternalSpec{Prefix: prefix, Ports: ports[:1]})
		if err != nil {
			t.Fatal(err)
		}
		any := prefix.Addr().Next().Next().Next() // not the outside's own
		out := udp(any, 53, "out")
		out.From = pods[0].Spec().IPs[family]
		wantReached(t, probe(t, pods[0], out)[0], cidr+":53", out.From)
		in := udp(pods[0].Spec().IPs[family+2], 53, "in")
		in.From = any
		wantReached(t, probe(t, outside, in)[0], "test/pod-0:53", any)
	}
}

// TestDatagramOutcomesDiffer holds each way in which a datagram is not answered apart from the others, and says of each whether it arrived.
func TestDatagramOutcomesDiffer(t *testing.T) {
	n := testNetwork(t, netns.Config{ProbeTimeout: 400 * time.Millisecond})
	var ports []netns.Port
	for _, number := range []uint16{53, 54, 55, 56} {
		ports = append(ports, netns.Port{Number: number, Protocol: netns.UDP, Speaks: netns.ClientFirst})
	}
	pods := testPods(t, n, 2, ports...)
	for _, c := range []struct {
		pod  int
		hook *nftables.ChainHook
		at   uint32 // offset of the port
		port uint16
	}{
		{1, nftables.ChainHookPrerouting, 2, 54},  // on the way in
		{1, nftables.ChainHookPostrouting, 0, 55}, // the answer, on its way out
		{0, nftables.ChainHookPostrouting, 2, 56}, // in the sender's own namespace
	} {
		if err := pods[c.pod].Do(func() error { return dropDatagrams(c.hook, c.at, c.port) }); err != nil {
			t.Fatal(err)
		}
	}
	for family, ip := range pods[1].Spec().IPs {
		nowhere := netip.MustParseAddr([]string{"10.64.99.99", "fd00:10:64::99"}[family])
		for _, c := range []struct {
			name    string
			target  netns.Target
			err     string
			arrived int
		}{
			{"answered", udp(ip, 53, "a"), "", 1},
			{"nobody listens", udp(ip, 81, "b"), netns.Refused, 0},
			{"nobody has the address", udp(nowhere, 53, "c"), netns.Unreachable, 0},
			{"dropped at the destination", udp(ip, 54, "d"), netns.TimedOut, 0},
			{"the answer is dropped", udp(ip, 55, "e"), netns.TimedOut, 3},
			{"refused by the sender's own filter", udp(ip, 56, "f"), netns.NotPermitted, 0},
		} {
			t.Run(fmt.Sprintf("%s/%s", c.name, ip), func(t *testing.T) {
				o := probe(t, pods[0], c.target)[0]
				if o.Connect != netns.Connected || o.Err != c.err || (o.Reached != "") != (c.err == "") || (o.Bytes > 0) != (c.err == "") {
					t.Errorf("got %+v, want error %q", o, c.err)
				}
				got := arrivals(t, n, pods[1])
				if len(got) != c.arrived || c.arrived > 0 && got[0].Nonce != c.target.Nonce {
					t.Errorf("%v arrived, want %d", got, c.arrived)
				}
			})
		}
	}
}

// dropDatagrams drops in the current namespace, at a hook, UDP with that port at that offset of its header.
func dropDatagrams(hook *nftables.ChainHook, offset uint32, port uint16) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	name := fmt.Sprintf("drop-%d", port)
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name})
	chain := c.AddChain(&nftables.Chain{Table: table, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
		&expr.Cmp{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}})
	return c.Flush()
}

// TestNothingIsOnItsWayAfterAFence sends from many threads at once, asks nobody to answer, and finds every datagram after the fence.
func TestNothingIsOnItsWayAfterAFence(t *testing.T) {
	const senders, each, rounds = 4, 50, 20
	n := testNetwork(t, netns.Config{})
	pods := testPods(t, n, senders+1, netns.Port{Number: 53, Protocol: netns.UDP, Speaks: netns.ClientFirst})
	to := pods[senders]
	conns := make([]net.Conn, senders)
	for i := range conns {
		address := netip.AddrPortFrom(to.Spec().IPs[i%2], 53).String()
		if err := pods[i].Do(func() (err error) { conns[i], err = net.Dial("udp", address); return err }); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
	}
	for round := range rounds {
		var sending sync.WaitGroup
		for i, c := range conns {
			sending.Go(func() {
				for k := range each {
					if _, err := fmt.Fprintf(c, "mantlet-probe %d-%d-%d", round, i, k); err != nil {
						t.Error(err)
					}
				}
			})
		}
		sending.Wait()
		got := arrivals(t, n, to)
		nonces := map[string]bool{}
		for _, a := range got {
			nonces[a.Nonce] = strings.HasPrefix(a.Nonce, fmt.Sprint(round)+"-")
		}
		if len(got) != senders*each || len(nonces) != len(got) || slices.Contains(slices.Collect(maps.Values(nonces)), false) {
			t.Fatalf("round %d: %d datagrams, %d different, want %d of this round", round, len(got), len(nonces), senders*each)
		}
	}
}

// TestAFullSocketIsTold stops the probe server, fills its socket, and lets it go on: what was lost is counted, and once.
func TestAFullSocketIsTold(t *testing.T) {
	const many = 5000 // several times what a socket takes by default
	n := testNetwork(t, netns.Config{})
	pods := testPods(t, n, 2, netns.Port{Number: 53, Protocol: netns.UDP, Speaks: netns.ClientFirst})
	var c net.Conn
	address := netip.AddrPortFrom(pods[1].Spec().IPs[0], 53).String()
	if err := pods[0].Do(func() (err error) { c, err = net.Dial("udp", address); return err }); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	server := appProcess(t, pods[1])
	kill(t, server, unix.SIGSTOP)
	for i := range many {
		if _, err := fmt.Fprintf(c, "mantlet-probe %d", i); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Fence(t.Context()); err != nil {
		t.Fatal(err)
	}
	kill(t, server, unix.SIGCONT)
	got, err := pods[1].Arrivals(t.Context())
	if err != nil || got.Lost == 0 || got.Lost+len(got.Datagrams) != many {
		t.Fatalf("%d arrived, %d lost, of %d; %v", len(got.Datagrams), got.Lost, many, err)
	}
	if again := arrivals(t, n, pods[1]); len(again) != 0 {
		t.Errorf("%d more", len(again))
	}
}

// appProcess is the process id of a pod's probe server.
func appProcess(t *testing.T, pod *netns.Pod) int {
	t.Helper()
	for _, pid := range processes() {
		if cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); strings.HasPrefix(string(cmdline), "mantlet:app\x00"+pod.Name()+"\x00") {
			return pid
		}
	}
	t.Fatalf("%s has no probe server", pod.Name())
	return 0
}

func kill(t *testing.T, pid int, s unix.Signal) {
	t.Helper()
	if err := unix.Kill(pid, s); err != nil {
		t.Fatal(err)
	}
}

func TestDatagramProbesAreChecked(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pod := testPods(t, n, 1)[0]
	good := udp(pod.Spec().IPs[0], 53, "n")
	for name, change := range map[string]func(*netns.Target){
		"no nonce":       func(t *netns.Target) { t.Nonce = "" },
		"two lines":      func(t *netns.Target) { t.Nonce = "a\nb" },
		"too long":       func(t *netns.Target) { t.Nonce = strings.Repeat("x", 1000) },
		"server first":   func(t *netns.Target) { t.Speaks = netns.ServerFirst },
		"held":           func(t *netns.Target) { t.Hold = time.Second },
		"other protocol": func(t *netns.Target) { t.Protocol = unix.IPPROTO_SCTP },
	} {
		bad := good
		change(&bad)
		if _, err := pod.Probe(t.Context(), []netns.Target{bad}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	for name, port := range map[string]netns.Port{
		"server first":   {Number: 1, Protocol: netns.UDP, Speaks: netns.ServerFirst},
		"other protocol": {Number: 1, Protocol: unix.IPPROTO_SCTP, Speaks: netns.ClientFirst},
	} {
		spec := netns.PodSpec{Namespace: "a", Name: "b", IPs: []netip.Addr{netip.MustParseAddr("10.64.9.9")}, Ports: []netns.Port{port}}
		if _, err := n.AddPod(t.Context(), spec); err == nil {
			t.Errorf("port: %s: no error", name)
		}
	}
}
