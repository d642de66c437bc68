package netfilter

import (
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forgetFormerNode has conntrack forget what has passed the redirect from addresses that are none of the node's, and returns how many
// connections that were.
func forgetFormerNode(node []netip.Addr) (int, error) {
	local, err := Addresses()
	if err != nil {
		return 0, err
	}
	return Forget(func() netlink.CustomConntrackFilter { return formerNode{node, local} })
}

// formerNode matches TCP that came to the pod, was not redirected, and is not from the node.
type formerNode struct {
	node  []netip.Addr
	local map[netip.Addr]bool
}

// MatchConntrackFlow makes it a netlink.CustomConntrackFilter.
func (f formerNode) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	from, to := Address(flow.Forward.SrcIP), Address(flow.Forward.DstIP)
	switch {
	case flow.Forward.Protocol != unix.IPPROTO_TCP:
		return false
	case from.IsLoopback() || f.local[from] || !f.local[to]:
		return false
	case flow.Reverse.SrcPort != flow.Forward.DstPort: // replies come from where it was redirected to
		return false
	}
	return !slices.Contains(f.node, from)
}
