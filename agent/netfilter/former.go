package netfilter

import (
	"errors"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forgetFormerNode has conntrack forget what has passed the redirect from addresses that are none of the node's, and returns how many
// connections that were. The kernel walks all of its table for each reading, so the second comes only where the first finds something.
func forgetFormerNode(node []netip.Addr) (int, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return 0, err
	}
	former := formerNode{node: node}
	for _, a := range list {
		former.local = append(former.local, address(a.IP))
	}
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return 0, err
	}
	defer h.Close()
	var flows []*netlink.ConntrackFlow
	err = whole(func() (err error) {
		flows, err = h.ConntrackTableList(netlink.ConntrackTable, unix.AF_UNSPEC)
		return err
	})
	if err != nil || !slices.ContainsFunc(flows, former.MatchConntrackFlow) {
		return 0, err
	}
	total := 0
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		err := whole(func() error {
			n, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, family, former)
			total += int(n)
			return err
		})
		if err != nil {
			return total, err
		}
	}
	return total, nil
}

// whole reads a table that may change meanwhile: then again, some times.
func whole(read func() error) (err error) {
	for range 10 {
		if err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
	}
	return err
}

// formerNode matches TCP that came to the pod, was not redirected, and is not from the node.
type formerNode struct{ node, local []netip.Addr }

// MatchConntrackFlow makes it a netlink.CustomConntrackFilter.
func (f formerNode) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	from, to := address(flow.Forward.SrcIP), address(flow.Forward.DstIP)
	switch {
	case flow.Forward.Protocol != unix.IPPROTO_TCP:
		return false
	case from.IsLoopback() || slices.Contains(f.local, from) || !slices.Contains(f.local, to):
		return false
	case flow.Reverse.SrcPort != flow.Forward.DstPort: // replies come from where it was redirected to
		return false
	}
	return !slices.Contains(f.node, from)
}

func address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
