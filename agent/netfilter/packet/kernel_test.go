package packet

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/verdict"
)

func TestMain(m *testing.M) { os.Exit(podtest.Main(m)) }

// The peers are addresses at the other end of the pod's eth0; the first of each family is the pod's node.
var (
	node4, node6 = podtest.OutsideIPv4, podtest.OutsideIPv6
	peers        = addrs("10.99.0.3", "10.99.0.4", "10.99.0.7", "10.99.0.8", "fd99::3", "fd99::4", "fd99::7", "fd99::8")
	own          = []netip.Addr{podtest.PodIPv4, podtest.PodIPv6}
)

// awaitLocal waits until the addresses of this network namespace are routed to itself: the kernel sees to that some time after they were
// added, and until then they lead out by the link.
func awaitLocal(t *testing.T, list []netip.Addr) {
	deadline := time.Now().Add(10 * time.Second)
	for _, a := range list {
		for {
			routes, err := netlink.RouteGet(a.AsSlice())
			if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s is not routed to itself: %v, %v", a, routes, err)
				return
			}
			time.Sleep(time.Millisecond) //nolint:forbidigo // the kernel installs local routes without an event to us
		}
	}
}

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// surroundings connects the pod with all peers.
func surroundings(t *testing.T) *podtest.Outside {
	t.Helper()
	outside := podtest.Connect(t)
	outside.Do(func() {
		link, err := netlink.LinkByName("peer0")
		if err != nil {
			t.Error(err)
			return
		}
		for _, a := range peers {
			ipnet := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
			if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipnet, Flags: unix.IFA_F_NODAD}); err != nil {
				t.Errorf("address %s: %v", a, err)
				return
			}
		}
		awaitLocal(t, append(slices.Clone(peers), node4, node6))
	})
	awaitLocal(t, own)
	if t.Failed() {
		t.FailNow()
	}
	return outside
}

// here is the policy with the addresses of the pod's node.
func here(p verdict.Packets) *verdict.Packets {
	p.Node = []netip.Addr{node4, node6}
	return &p
}

// kernel is a connection that lasts as long as the test.
func kernel(t *testing.T) *netfilter.Conn {
	c := Open()
	t.Cleanup(c.Close)
	return c
}

func apply(t *testing.T, p verdict.Packets) {
	t.Helper()
	if err := Apply(kernel(t), here(p)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Remove(kernel(t)); err != nil {
			t.Error(err)
		}
	})
}

// udp is a block for one range of UDP ports.
func udp(first, last uint16, allowed ...string) verdict.PacketBlock {
	b := verdict.PacketBlock{Protocol: verdict.UDP, Ports: []verdict.PortRange{{First: first, Last: last}}}
	for _, s := range allowed {
		b.Peers = append(b.Peers, verdict.PacketPrefix{Prefix: netip.MustParsePrefix(s), Allow: true})
	}
	return b
}

// socket opens a UDP socket, in the pod or outside.
func socket(t *testing.T, outside *podtest.Outside, address string) net.PacketConn {
	t.Helper()
	var c net.PacketConn
	var err error
	open := func() { c, err = net.ListenPacket("udp", address) }
	if outside == nil {
		open()
	} else {
		outside.Do(open)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func to(a netip.Addr, port uint16) net.Addr {
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(a, port))
}

func portOf(c net.PacketConn) uint16 { return c.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// same is the address of the same family.
func same(a netip.Addr, in []netip.Addr) netip.Addr {
	for _, b := range in {
		if a.Is4() == b.Is4() {
			return b
		}
	}
	return netip.Addr{}
}

// send sends a word. It reports whether the kernel took it; EPERM is what a drop on the way out looks like.
func send(t *testing.T, c net.PacketConn, dest net.Addr, word string) bool {
	t.Helper()
	_, err := c.WriteTo([]byte(word), dest)
	if err != nil && !errors.Is(err, syscall.EPERM) {
		t.Fatalf("send to %s: %v", dest, err)
	}
	return err == nil
}

// receive returns the next word and its sender.
func receive(t *testing.T, c net.PacketConn) (string, net.Addr) {
	t.Helper()
	buf := make([]byte, 16384)
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, from, err := c.ReadFrom(buf)
	if err != nil {
		t.Fatalf("receive at %s: %v", c.LocalAddr(), err)
	}
	return string(buf[:n]), from
}

// arrivals sends a word from every peer to a port of the pod, and then one from the node, which always arrives; it returns what arrived
// before that.
func arrivals(t *testing.T, outside *podtest.Outside, at net.PacketConn, port uint16) map[netip.Addr]bool {
	t.Helper()
	got := map[netip.Addr]bool{}
	for _, node := range []netip.Addr{node4, node6} {
		for _, p := range peers {
			if p.Is4() == node.Is4() {
				send(t, socket(t, outside, netip.AddrPortFrom(p, 0).String()), to(same(p, own), port), p.String())
			}
		}
		send(t, socket(t, outside, netip.AddrPortFrom(node, 0).String()), to(same(node, own), port), "end")
		for {
			word, _ := receive(t, at)
			if word == "end" {
				break
			}
			got[netip.MustParseAddr(word)] = true
		}
	}
	return got
}

// TestKernelAgreesWithValue sends real datagrams both ways: from and to every peer, on ports in and around the blocks.
func TestKernelAgreesWithValue(t *testing.T) {
	outside := surroundings(t)
	deny := func(s string) verdict.PacketPrefix { return verdict.PacketPrefix{Prefix: netip.MustParsePrefix(s)} }
	carved := udp(53, 53, "10.99.0.0/29", "fd99::/125")
	carved.Peers = []verdict.PacketPrefix{carved.Peers[0], deny("10.99.0.4/32"), carved.Peers[1], deny("fd99::4/128")}
	for name, blocks := range map[string][]verdict.PacketBlock{
		"nothing":              nil,
		"everything":           {udp(1, 65535, "0.0.0.0/0", "::/0")},
		"only IPv6":            {udp(1, 65535, "::/0")},
		"a carved range":       {carved},
		"touching port ranges": {udp(1, 53, "10.99.0.3/32"), udp(54, 54, "10.99.0.4/32", "fd99::4/128"), udp(55, 65535, "fd99::3/128")},
		"the upper ends":       {udp(65535, 65535, "10.99.0.4/30", "128.0.0.0/1", "8000::/1")},
		"SCTP is not UDP":      {{Protocol: verdict.SCTP, Ports: []verdict.PortRange{verdict.AllPorts}, Peers: udp(1, 1, "0.0.0.0/0", "::/0").Peers}},
	} {
		t.Run(name, func(t *testing.T) {
			p := verdict.Packets{Ingress: blocks, Egress: blocks}
			apply(t, p)
			for _, port := range []uint16{1, 52, 53, 54, 55, 65535} {
				got := arrivals(t, outside, socket(t, nil, fmt.Sprintf("[::]:%d", port)), port)
				sender := socket(t, nil, "[::]:0")
				for _, a := range peers {
					if want := p.AllowsIngress(verdict.UDP, port, a); got[a] != want {
						t.Errorf("from %s to port %d: arrived=%v, want %v", a, port, got[a], want)
					}
					want := p.AllowsEgress(verdict.UDP, port, a)
					if left := send(t, sender, to(a, port), "x"); left != want {
						t.Errorf("to %s port %d: sent=%v, want %v", a, port, left, want)
					}
				}
				for _, a := range []netip.Addr{node4, node6, own[0], own[1], netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
					if !send(t, sender, to(a, port), "x") {
						t.Errorf("to %s port %d: not sent; own node, self and loopback always are", a, port)
					}
				}
			}
		})
	}
}

// A pod talks to itself, by loopback and by its own addresses, whatever policy says.
func TestSelf(t *testing.T) {
	surroundings(t)
	apply(t, verdict.Packets{})
	at := socket(t, nil, "[::]:8053")
	c := socket(t, nil, "[::]:0")
	for _, a := range append(addrs("127.0.0.1", "::1"), own...) {
		if !send(t, c, to(a, 8053), a.String()) {
			t.Errorf("to %s: dropped", a)
			continue
		}
		if got, _ := receive(t, at); got != a.String() {
			t.Errorf("got %q, sent to %s", got, a)
		}
	}
}

// Who may be talked to may answer, and who may talk is answered, where the other direction admits nothing.
func TestReplies(t *testing.T) {
	outside := surroundings(t)
	pair := func(a netip.Addr) (inside, there net.PacketConn, host string) {
		return socket(t, nil, netip.AddrPortFrom(same(a, own), 0).String()), socket(t, outside, netip.AddrPortFrom(a, 0).String()),
			netip.PrefixFrom(a, a.BitLen()).String()
	}
	for _, a := range peers {
		inside, there, host := pair(a)
		port := portOf(there)
		apply(t, verdict.Packets{Egress: []verdict.PacketBlock{udp(port, port, host)}})
		send(t, inside, there.LocalAddr(), "question")
		word, from := receive(t, there)
		send(t, there, from, "answer to "+word)
		if got, _ := receive(t, inside); got != "answer to question" {
			t.Errorf("%s: got %q", a, got)
		}
	}
	for _, a := range peers {
		inside, there, host := pair(a)
		port := portOf(inside)
		apply(t, verdict.Packets{Ingress: []verdict.PacketBlock{udp(port, port, host)}})
		send(t, there, inside.LocalAddr(), "question")
		word, from := receive(t, inside)
		if !send(t, inside, from, "answer to "+word) {
			t.Errorf("%s: the answer was dropped", a)
		}
		if got, _ := receive(t, there); got != "answer to question" {
			t.Errorf("%s: got %q", a, got)
		}
	}
}

// What a narrower policy does not admit is cut at the next datagram: new flows, and those that never had an answer. TestRevoke has those that had.
func TestNarrowing(t *testing.T) {
	outside := surroundings(t)
	const port = 9055
	at := socket(t, nil, fmt.Sprintf("[::]:%d", port))
	wide := udp(port, port, "10.99.0.0/24", "fd99::/64")
	narrow := udp(port, port, "10.99.0.4/32", "fd99::4/128")
	apply(t, verdict.Packets{Ingress: []verdict.PacketBlock{wide}, Egress: []verdict.PacketBlock{wide}})
	old := map[netip.Addr]net.PacketConn{}
	for _, a := range peers {
		old[a] = socket(t, outside, netip.AddrPortFrom(a, 0).String())
		send(t, old[a], to(same(a, own), port), "old")
		if got, _ := receive(t, at); got != "old" {
			t.Fatalf("%s: got %q", a, got)
		}
	}
	apply(t, verdict.Packets{Ingress: []verdict.PacketBlock{narrow}, Egress: []verdict.PacketBlock{narrow}})
	for _, a := range peers {
		send(t, old[a], to(same(a, own), port), "late "+a.String()) // arrives for .4 only
	}
	for _, want := range []string{"late 10.99.0.4", "late fd99::4"} {
		if got, _ := receive(t, at); got != want {
			t.Errorf("old flows: got %q, want %q", got, want)
		}
	}
	for a, arrived := range arrivals(t, outside, at, port) {
		if arrived != (a == peers[1] || a == peers[5]) {
			t.Errorf("%s: arrived=%v", a, arrived)
		}
	}
}

// While policies replace each other that all admit one peer and deny another, the one gets through all the time and the other never, whether the
// whole table is written or what differs.
func TestNoGapWhileReplacing(t *testing.T) {
	outside := surroundings(t)
	const port, swaps = 9056, 100
	at := socket(t, nil, fmt.Sprintf("[::]:%d", port))
	policies := []verdict.Packets{
		{Ingress: []verdict.PacketBlock{udp(port, port, "10.99.0.3/32", "10.99.0.8/32"), udp(port+1, port+1, "10.99.0.4/32")}},
		{Ingress: []verdict.PacketBlock{udp(1, 65535, "10.99.0.2/31", "fd99::/64")}},
	}
	apply(t, policies[0])
	allowed, denied := socket(t, outside, "10.99.0.3:0"), socket(t, outside, "10.99.0.4:0")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { close(stop) })
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				_, _ = denied.WriteTo([]byte("denied"), to(own[0], port))
			}
		}
	})
	conn, table := kernel(t), OpenTable(slog.New(slog.DiscardHandler))
	t.Cleanup(table.Close)
	for name, replace := range map[string]func(*verdict.Packets) error{
		"whole":       func(p *verdict.Packets) error { return Apply(conn, p) },
		"differences": table.Apply,
	} {
		lost := 0
		for i := range swaps {
			done := make(chan error, 1)
			wg.Go(func() { done <- replace(here(policies[i%2])) })
			for n := range 20 {
				lost += deliver(t, allowed, at, fmt.Sprintf("%s %d.%d", name, i, n))
			}
			if err := <-done; err != nil {
				t.Fatal(err)
			}
		}
		t.Logf("%s: %d of %d datagrams had to be sent again, while %d tables were replaced and another peer sent as fast as it could", name, lost, 20*swaps, swaps)
	}
}

// deliver sends a word until it arrives, because datagrams may be lost on the way; nothing else may arrive. It returns how many were lost.
func deliver(t *testing.T, from, at net.PacketConn, word string) (lost int) {
	t.Helper()
	buf := make([]byte, 128)
	dest := to(own[0], portOf(at))
	for ; lost < 100; lost++ {
		send(t, from, dest, word)
		_ = at.SetReadDeadline(time.Now().Add(time.Second))
		for {
			n, sender, err := at.ReadFrom(buf)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil || sender.String() != from.LocalAddr().String() {
				t.Fatalf("got %q from %v, %v; want %q", buf[:n], sender, err, word)
			}
			if string(buf[:n]) == word {
				return lost
			}
		}
	}
	t.Fatalf("%q never arrived", word)
	return lost
}
