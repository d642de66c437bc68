package netfilter

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Forget has conntrack forget flows, in the network namespace of the calling thread, and returns how many. match is asked before each reading which they
// are. They come to their next packet as new ones.
//
// The kernel walks all buckets of its one table for each reading, whoever's flows they hold: 10 ms of CPU with 262,144 of them. So both
// families are read at once, and a family once more only where it has something to be forgotten.
func Forget(match func() netlink.CustomConntrackFilter) (n int, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER) // one socket for all that is asked
	if err != nil {
		return 0, fmt.Errorf("open conntrack: %w", err)
	}
	defer h.Close()
	in := noted{match: match(), families: map[netlink.InetFamily]bool{}}
	err = read(func() error {
		_, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_UNSPEC, in)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read flows (needs CAP_NET_ADMIN and nf_conntrack_netlink in the kernel): %w", err)
	}
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} { // the kernel is told of a flow in its own family
		if !in.families[family] {
			continue
		}
		err := read(func() error {
			forgotten, err := h.ConntrackDeleteFilters(netlink.ConntrackTable, family, match())
			n += int(forgotten)
			return err
		})
		if err != nil {
			return n, fmt.Errorf("forget flows (needs CAP_NET_ADMIN and nf_conntrack_netlink in the kernel): %w", err)
		}
	}
	return n, nil
}

// read reads the table, which may change meanwhile: then again, some times.
func read(do func() error) (err error) {
	for range 10 {
		if err = do(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return err
		}
	}
	return err
}

// noted notes the families of flows that match, and matches none. A list of all flows would be several times as large as the kernel's answer.
type noted struct {
	match    netlink.CustomConntrackFilter
	families map[netlink.InetFamily]bool
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (n noted) MatchConntrackFlow(f *netlink.ConntrackFlow) bool {
	if n.match.MatchConntrackFlow(f) {
		n.families[netlink.InetFamily(f.FamilyType)] = true
	}
	return false
}

// Addresses are those of the calling thread's network namespace.
func Addresses() (map[netip.Addr]bool, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("read the pod's addresses: %w", err)
	}
	out := map[netip.Addr]bool{}
	for _, a := range list {
		if addr := Address(a.IP); addr.IsValid() {
			out[addr] = true
		}
	}
	return out, nil
}

// Address is an address as netlink has it; not valid, where that is none.
func Address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
