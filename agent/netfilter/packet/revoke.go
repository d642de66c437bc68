package packet

import (
	"fmt"
	"net/netip"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// Revoke has conntrack forget the flows of UDP and SCTP, in the network namespace of the calling thread, that a policy does not allow, so that they
// may begin again in another way: those of services to an endpoint that is one, and those that a peer began at the pod's own end. It is for after Apply,
// whose rules let none of them through. All others are left alone, those of the proxy's mark too. It returns how many were forgotten. policy is asked for
// the policy in force as each flow is looked at.
//
// What the pod began and may not begin any more is remembered, for as long as anybody sends on it: forgotten, the peer's next packet would be a flow that
// the peer begins, which the pod's ingress may be open for, and what the pod sends would pass as replies to that. That the peer could begin one is not
// said: its own egress policy, or the translation of addresses on the way, may let it send only because the pod has begun.
func Revoke(policy func() *verdict.Packets) (int, error) {
	local, err := netfilter.Addresses()
	if err != nil {
		return 0, fmt.Errorf("packets: %w", err)
	}
	j := newJudge(policy(), local)
	n, err := netfilter.Forget(func(f *netfilter.Flow) bool {
		if p := policy(); p != j.packets {
			j = newJudge(p, local)
		}
		return j.ends(f)
	}, unix.IPPROTO_UDP, unix.IPPROTO_SCTP)
	if err != nil {
		return n, fmt.Errorf("packets: flows that are not allowed: %w", err)
	}
	return n, nil
}

// judge decides on flows.
type judge struct {
	packets         *verdict.Packets
	local           map[netip.Addr]bool
	ingress, egress []judgedBlock
}

// judgedBlock is a block with its peers as intervals.
type judgedBlock struct {
	*verdict.PacketBlock
	v4, v6 []interval
}

func newJudge(p *verdict.Packets, local map[netip.Addr]bool) *judge {
	blocks := func(list []verdict.PacketBlock) (out []judgedBlock) {
		for i := range list {
			v4, v6 := flatten(list[i].Peers)
			out = append(out, judgedBlock{&list[i], v4, v6})
		}
		return out
	}
	return &judge{p, local, blocks(p.Ingress), blocks(p.Egress)}
}

// ends reports whether a flow is not allowed.
func (j *judge) ends(f *netfilter.Flow) bool {
	proto := verdict.UDP
	if f.Protocol == unix.IPPROTO_SCTP {
		proto = verdict.SCTP
	}
	// Replies come from where the flow has been led to.
	return f.Mark != names.ProxyMark && j.forgets(proto, f.Source.Addr(), f.Destination, f.Replier)
}

// forgets decides on a flow from an address to another, which the pod has led to a third, or left as it is.
func (j *judge) forgets(proto verdict.Protocol, from netip.Addr, to, led netip.AddrPort) bool {
	admitted := j.here(led.Addr()) || j.decide(j.egress, proto, led)
	if !j.here(from) {
		return !admitted || !j.decide(j.ingress, proto, netip.AddrPortFrom(from, led.Port()))
	}
	// What begins here may be led to an endpoint. right: it still would be led where it is; again: it would come through if it began now.
	var right, again bool
	if s := j.packets.Service(proto, to); s != nil {
		right, again = slices.Contains(s.Endpoints, led), len(s.Endpoints) > 0
	} else {
		again = j.here(to.Addr()) || j.decide(j.egress, proto, to)
		right = to == led || again
	}
	return admitted && !right || !admitted && again
}

// here reports whether an address is the pod's own.
func (j *judge) here(a netip.Addr) bool { return j.local[a] || a.IsLoopback() }

// decide is verdict.Packets' AllowsIngress and AllowsEgress, faster: the address is the peer's.
func (j *judge) decide(blocks []judgedBlock, proto verdict.Protocol, peer netip.AddrPort) bool {
	addr, port := peer.Addr(), peer.Port()
	if slices.Contains(j.packets.Node, addr) {
		return true
	}
	for i := range blocks {
		b := &blocks[i]
		if b.Protocol != proto || !slices.ContainsFunc(b.Ports, func(r verdict.PortRange) bool { return r.First <= port && port <= r.Last }) {
			continue
		}
		in := b.v6
		if addr.Is4() {
			in = b.v4
		}
		at := sort.Search(len(in), func(k int) bool { return in[k].last.Compare(addr) >= 0 })
		return at < len(in) && in[at].first.Compare(addr) <= 0
	}
	return false
}
