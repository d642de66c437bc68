package kube

import (
	"cmp"
	"net/netip"
	"slices"
)

// Networks are the ranges from which a cluster gives addresses.
type Networks struct {
	Pods     []netip.Prefix
	Services []netip.Prefix
}

// Equal reports whether two are the same.
func (n Networks) Equal(o Networks) bool {
	return slices.Equal(n.Pods, o.Pods) && slices.Equal(n.Services, o.Services)
}

// outermost sorts prefixes and leaves out those that others hold.
func outermost(list []netip.Prefix) (out []netip.Prefix) {
	list = slices.Clone(list)
	for i := range list {
		list[i] = list[i].Masked()
	}
	slices.SortFunc(list, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	for _, p := range list {
		if n := len(out); n > 0 && out[n-1].Contains(p.Addr()) { // sorted: who holds it came just before
			continue
		}
		out = append(out, p)
	}
	return out
}

// parsePrefixes reads what the API server has validated; what is empty, or no prefix, is left out.
func parsePrefixes(list []string) (out []netip.Prefix) {
	for _, s := range list {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// parseAddrs reads one address, or none.
func parseAddrs(s string) []netip.Addr {
	a, err := netip.ParseAddr(s)
	if err != nil {
		return nil
	}
	return []netip.Addr{a.Unmap().WithZone("")}
}
