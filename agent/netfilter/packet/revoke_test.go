package packet

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
)

// Flows with replies end with the policy that allowed them, both directions, both families, and all others go on: also those of the
// agent, which no policy allows. What the peer began is forgotten by conntrack then, so that the pod may begin where it is allowed to.
func TestRevoke(t *testing.T) {
	outside := surroundings(t)
	const port = 9060
	wide := here(verdict.Packets{Ingress: []verdict.PacketBlock{udp(port, port, "10.99.0.0/24", "fd99::/64")}, Egress: []verdict.PacketBlock{udp(port+1, port+1, "10.99.0.0/24", "fd99::/64")}})
	narrow := here(verdict.Packets{Ingress: []verdict.PacketBlock{udp(port, port, "10.99.0.4/32", "fd99::4/128")}, Egress: []verdict.PacketBlock{udp(port+1, port+1, "10.99.0.4/32", "fd99::4/128")}})
	apply(t, *wide)
	if _, err := Revoke(as(wide)); err != nil { // what other tests have left
		t.Fatal(err)
	}
	at, from := socket(t, nil, fmt.Sprintf("[::]:%d", port)), socket(t, nil, ":0")
	marked, err := (&net.ListenConfig{Control: netfilter.Exempt}).ListenPacket(t.Context(), "udp", "10.99.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer marked.Close()
	type flow struct {
		peer    netip.Addr
		in, out net.PacketConn // at the peer: talks to at, is talked to by from
		from    net.Addr       // of from, as the peer sees it
	}
	var flows []flow
	dest := func(a netip.Addr) net.Addr { return to(a, port+1) }
	for _, a := range peers {
		f := flow{a, socket(t, outside, netip.AddrPortFrom(a, 0).String()), socket(t, outside, netip.AddrPortFrom(a, port+1).String()), nil}
		send(t, f.in, to(same(a, own), port), "in")
		word, sender := receive(t, at)
		send(t, at, sender, "reply")
		if back, _ := receive(t, f.in); word != "in" || back != "reply" {
			t.Fatalf("%s: got %q and %q", a, word, back)
		}
		send(t, from, dest(a), "out")
		word, sender = receive(t, f.out)
		send(t, f.out, sender, "reply")
		if back, _ := receive(t, from); word != "out" || back != "reply" {
			t.Fatalf("%s: got %q and %q", a, word, back)
		}
		f.from = sender
		flows = append(flows, f)
	}
	agents := socket(t, outside, "10.99.0.3:9070")
	send(t, marked, agents.LocalAddr(), "agent")
	if _, sender := receive(t, agents); sender.String() != marked.LocalAddr().String() {
		t.Fatal(sender)
	}

	goOn := func(when string) {
		t.Helper()
		for _, f := range flows {
			stays := f.peer == peers[1] || f.peer == peers[5]
			word := "late " + f.peer.String() + when
			if got := send(t, at, f.in.LocalAddr(), "more"); got != stays {
				t.Errorf("%s: to %s, which had begun: sent=%v", when, f.peer, got)
			}
			if got := send(t, from, dest(f.peer), "more"); got != stays {
				t.Errorf("%s: to %s: sent=%v", when, f.peer, got)
			}
			send(t, f.in, to(same(f.peer, own), port), word) // arrives from those that stay only
			send(t, f.out, f.from, word)
			if stays {
				if got, _ := receive(t, at); got != word {
					t.Errorf("%s: got %q", when, got)
				}
				if got, _ := receive(t, from); got != word {
					t.Errorf("%s: the answer is %q", when, got)
				}
			}
		}
	}
	if err := Apply(kernel(t), narrow); err != nil {
		t.Fatal(err)
	}
	goOn("before conntrack forgets")
	if n, err := Revoke(as(narrow)); err != nil || n != len(peers)-2 {
		t.Fatalf("revoked %d flows of %d, %v", n, 2*len(peers), err)
	}
	goOn("after")
	send(t, agents, marked.LocalAddr(), "answer")
	if word, _ := receive(t, marked); word != "answer" {
		t.Errorf("the agent got %q", word)
	}
}

// A flow that began at a peer keeps its ports until conntrack has forgotten it: what the pod sends there is a reply, whatever it may send itself.
// Then it is a flow of the pod's.
func TestOtherEndBegins(t *testing.T) {
	outside := surroundings(t)
	a := peers[0]
	both := here(verdict.Packets{Ingress: []verdict.PacketBlock{udp(1, 65535, "10.99.0.3/32")}, Egress: []verdict.PacketBlock{udp(1, 65535, "10.99.0.3/32")}})
	apply(t, *both)
	inside, there := socket(t, nil, netip.AddrPortFrom(same(a, own), 0).String()), socket(t, outside, netip.AddrPortFrom(a, 0).String())
	send(t, there, inside.LocalAddr(), "question")
	if _, from := receive(t, inside); !send(t, inside, from, "answer") {
		t.Fatal("the answer was dropped")
	}
	out := here(verdict.Packets{Ingress: []verdict.PacketBlock{}, Egress: both.Egress})
	apply(t, *out)
	if send(t, inside, there.LocalAddr(), "a reply") {
		t.Error("a reply passes on a flow that is not allowed")
	}
	if n, err := Revoke(as(out)); err != nil || n == 0 {
		t.Fatalf("revoked %d flows, %v", n, err)
	}
	receive(t, there) // the answer
	if !send(t, inside, there.LocalAddr(), "a flow of its own") {
		t.Fatal("what the pod may send is dropped")
	}
	_, from := receive(t, there)
	send(t, there, from, "the answer to that")
	if word, _ := receive(t, inside); word != "the answer to that" {
		t.Errorf("got %q", word)
	}
}

// A flow that a pod has begun does not become one that its peer has begun, when policy takes the pod's egress away and leaves its ingress open: the peer
// may go on sending, and what the pod answers would pass as replies. So it is where a service led there that has no endpoints any more.
func TestDeniedFlowIsNotTurnedRound(t *testing.T) {
	outside := surroundings(t)
	anyone := []verdict.PacketBlock{udp(1, 65535, "0.0.0.0/0", "::/0")}
	routes(t)
	for _, a := range []netip.Addr{peers[0], peers[4]} {
		app, server := socket(t, nil, netip.AddrPortFrom(same(a, own), 0).String()), socket(t, outside, netip.AddrPortFrom(a, 0).String())
		at := server.LocalAddr().(*net.UDPAddr).AddrPort()
		open, closed := here(verdict.Packets{Ingress: anyone, Egress: anyone}), here(verdict.Packets{Ingress: anyone})
		asked := server.LocalAddr()
		if a.Is4() {
			open.Services = []verdict.PacketService{{Protocol: verdict.UDP, Addr: vip4, Endpoints: []netip.AddrPort{at}}}
			closed.Services = []verdict.PacketService{{Protocol: verdict.UDP, Addr: vip4}}
			asked = net.UDPAddrFromAddrPort(vip4)
		}
		apply(t, *open)
		if _, err := Revoke(as(open)); err != nil {
			t.Fatal(err)
		}
		send(t, app, asked, "hello")
		receive(t, server)
		send(t, server, app.LocalAddr(), "stream")
		if word, from := receive(t, app); word != "stream" || from.String() != asked.String() {
			t.Fatalf("got %q from %s, not from %s", word, from, asked)
		}
		apply(t, *closed)
		for range 2 {
			if n, err := Revoke(as(closed)); err != nil || n != 0 {
				t.Errorf("revoked %d flows, %v", n, err)
			}
			send(t, server, app.LocalAddr(), "stream")
			if send(t, app, server.LocalAddr(), "more") || send(t, app, asked, "more") {
				t.Errorf("%s: what the pod may not send passes", a)
			}
		}
		apply(t, *open) // and goes on where it may again
		if !send(t, app, asked, "again") {
			t.Errorf("%s: what the pod may send again is dropped", a)
		}
		if word, _ := receive(t, server); word != "again" {
			t.Errorf("got %q", word)
		}
	}
}

// TestRevokeThousands ends half of some thousand flows.
func TestRevokeThousands(t *testing.T) {
	outside := surroundings(t)
	const flows, first = 4000, 20000
	policy := func(list ...string) *verdict.Packets {
		return here(verdict.Packets{Ingress: []verdict.PacketBlock{udp(first, first+flows, list...)}})
	}
	wide, narrow := policy("10.99.0.3/32", "10.99.0.4/32"), policy("10.99.0.4/32")
	apply(t, *wide)
	if _, err := Revoke(as(wide)); err != nil {
		t.Fatal(err)
	}
	from := [2]net.PacketConn{socket(t, outside, "10.99.0.3:0"), socket(t, outside, "10.99.0.4:0")}
	for i := range flows {
		for sent := false; !sent; { // ICMP says now and then that nobody listens, which a later send is told of
			_, err := from[i%2].WriteTo([]byte("x"), to(netip.MustParseAddr("10.99.0.2"), uint16(first+i)))
			sent = err == nil
		}
	}
	if err := Apply(kernel(t), narrow); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	n, err := Revoke(as(narrow))
	t.Logf("%d of %d flows revoked in %v", n, flows, time.Since(start))
	if err != nil || n != flows/2 {
		t.Errorf("revoked %d flows, %v", n, err)
	}
	left, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil {
		t.Fatal(err)
	}
	stay := 0
	for _, f := range left {
		switch port := f.Forward.DstPort; {
		case f.Forward.Protocol != unix.IPPROTO_UDP || port < first || port >= first+flows:
		case f.Forward.SrcIP.Equal(peers[1].AsSlice()):
			stay++
		default:
			t.Fatalf("%s is left", f)
		}
	}
	if stay != flows/2 {
		t.Errorf("%d flows stay, not %d", stay, flows/2)
	}
}

func as(p *verdict.Packets) func() *verdict.Packets { return func() *verdict.Packets { return p } }
