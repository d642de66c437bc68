package packet

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/mantlet/mantlet/verdict"
)

// TestWidens holds Widens against flows, all that there can be in a small world: where it says yes, none that was allowed is not any more.
func TestWidens(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	said := map[bool]int{}
	for range 20000 {
		before := smallPackets(rnd)
		next := smallPackets(rnd)
		if rnd.IntN(3) == 0 { // the same and a little more, or less
			next = smallPackets(rand.New(rand.NewPCG(rnd.Uint64(), 0)))
			next.Ingress, next.Egress = slices.Concat(before.Ingress, nil), before.Egress
			if len(next.Ingress) > 0 && rnd.IntN(2) == 0 {
				next.Ingress = next.Ingress[1:]
			}
		}
		widens := Widens(before, next)
		said[widens]++
		lost := false
		for port := range uint16(6) {
			for _, a := range smallAddrs {
				for _, proto := range []verdict.Protocol{verdict.UDP, verdict.SCTP} {
					lost = lost || before.AllowsIngress(proto, port, a) && !next.AllowsIngress(proto, port, a) ||
						before.AllowsEgress(proto, port, a) && !next.AllowsEgress(proto, port, a)
				}
			}
		}
		if widens && lost {
			t.Fatalf("a flow is lost, from\n%+v\nto\n%+v", before, next)
		}
		if !widens && !lost && slices.Equal(before.Node, next.Node) {
			said[false]-- // of no harm, but then how often does it see that something is lost?
		}
	}
	if said[true] < 500 || said[false] < 500 {
		t.Errorf("said %v: one of both is hardly tried", said)
	}
	same := smallPackets(rnd)
	if !Widens(same, same) {
		t.Errorf("%+v loses something against itself", same)
	}
}

func TestReleads(t *testing.T) {
	vip, one, two := netip.MustParseAddrPort("10.1.0.1:53"), netip.MustParseAddrPort("10.0.0.1:53"), netip.MustParseAddrPort("10.0.0.2:53")
	to := func(endpoints ...netip.AddrPort) *verdict.Packets {
		return &verdict.Packets{Services: []verdict.PacketService{{Protocol: verdict.UDP, Addr: vip, Endpoints: endpoints}}}
	}
	none := &verdict.Packets{}
	admitted := &verdict.Packets{Egress: []verdict.PacketBlock{udp(53, 53, "10.1.0.0/16")}}
	reachable := &verdict.Packets{Egress: []verdict.PacketBlock{udp(53, 53, "10.0.0.1/32")}}
	for _, c := range []struct {
		what         string
		before, next *verdict.Packets
		want         bool
		misleads     bool
	}{
		{"the same", to(one, two), to(one, two), false, false},
		{"an endpoint more", to(two), to(one, two), false, false},
		{"an endpoint less", to(one, two), to(two), true, true},
		{"another endpoint", to(one), to(two), true, true},
		{"no endpoint any more", to(one), to(), true, false},
		{"a service less", to(one), none, true, false},
		{"a service less, whose endpoint may be reached", to(one), reachable, true, true},
		{"a service more, without endpoints", none, to(), false, false},
		{"a service more, to which there may have been flows", none, to(one), true, false},
		{"a service that had no endpoints", to(), to(one), true, false},
		{"a service more, to which there may be flows", admitted, to(one), true, true},
		{"no service", none, admitted, false, false},
	} {
		if got := Releads(c.before, c.next); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
		if got := Misleads(c.before, c.next); got != c.misleads {
			t.Errorf("%s: misleads: %v", c.what, got)
		}
		if c.want && Widens(c.before, c.next) {
			t.Errorf("%s: nothing is to be forgotten", c.what)
		}
	}
}

var smallAddrs = []netip.Addr{
	netip.MustParseAddr("10.0.0.0"), netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("10.0.0.3"),
	netip.MustParseAddr("fd00::"), netip.MustParseAddr("fd00::1"),
}

// smallPackets draws a policy on ports 0 to 5 and smallAddrs.
func smallPackets(rnd *rand.Rand) *verdict.Packets {
	blocks := func() (out []verdict.PacketBlock) {
		for _, proto := range []verdict.Protocol{verdict.UDP, verdict.SCTP} {
			for first := uint16(0); first < 6; {
				last := min(5, first+uint16(rnd.IntN(4)))
				if rnd.IntN(3) > 0 {
					out = append(out, verdict.PacketBlock{Protocol: proto, Ports: []verdict.PortRange{{First: first, Last: last}}, Peers: smallPeers(rnd)})
				}
				first = last + 1
			}
		}
		return out
	}
	p := &verdict.Packets{Ingress: blocks(), Egress: blocks()}
	if rnd.IntN(8) == 0 {
		p.Node = smallAddrs[1:2]
	}
	return p
}

func smallPeers(rnd *rand.Rand) (out []verdict.PacketPrefix) {
	seen := map[netip.Prefix]bool{}
	for range rnd.IntN(4) {
		a := smallAddrs[rnd.IntN(len(smallAddrs))]
		p, _ := a.Prefix(a.BitLen() - rnd.IntN(4))
		if !seen[p] {
			seen[p] = true
			out = append(out, verdict.PacketPrefix{Prefix: p, Allow: rnd.IntN(4) > 0})
		}
	}
	slices.SortFunc(out, verdict.PacketPrefix.Compare)
	return out
}
