package netfilter

import (
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// forgetFormerNode has conntrack forget what has passed the redirect from addresses that are none of the node's, and returns how many
// connections that were.
func forgetFormerNode(node []netip.Addr) (int, error) {
	local, err := Addresses()
	if err != nil {
		return 0, err
	}
	former := formerNode{node, local}
	return Forget(former.has, unix.IPPROTO_TCP)
}

// formerNode knows TCP that came to the pod, was not redirected, and is not from the node.
type formerNode struct {
	node  []netip.Addr
	local map[netip.Addr]bool
}

func (f formerNode) has(flow *Flow) bool {
	from, to := flow.Source.Addr(), flow.Destination.Addr()
	switch {
	case from.IsLoopback() || f.local[from] || !f.local[to]:
		return false
	case flow.Replier.Port() != flow.Destination.Port(): // replies come from where it was redirected to
		return false
	}
	return !slices.Contains(f.node, from)
}
