package hold

import (
	"net/netip"
	"slices"

	"github.com/mantlet/mantlet/verdict"
)

// box is a range of addresses of one family on a range of ports, ends included.
type box struct {
	first, last netip.Addr
	ports       verdict.PortRange
}

// admitted lists what an egress table lets peers without an identity be reached at, over TCP: for IPv4 and for IPv6. Interval sets know no
// longest prefix, so prefixes are flattened; the boxes do not overlap.
func admitted(t *verdict.Table) (boxes [2][]box) {
	for _, b := range t.Blocks {
		if b.Protocol != verdict.TCP {
			continue
		}
		for _, s := range flatten(b.Peers.Anonymous) {
			f := familyOf(s.first)
			for _, ports := range b.Ports {
				boxes[f] = append(boxes[f], box{s.first, s.last, ports})
			}
		}
	}
	return boxes
}

type span struct{ first, last netip.Addr }

// flatten returns the addresses that the longest prefix allows, as ranges in ascending order that do not touch.
func flatten(prefixes []verdict.Prefix) (out []span) {
	sorted := slices.Clone(prefixes)
	slices.SortFunc(sorted, func(a, b verdict.Prefix) int {
		if c := a.Prefix.Addr().Compare(b.Prefix.Addr()); c != 0 {
			return c
		}
		return a.Prefix.Bits() - b.Prefix.Bits()
	})
	var open []verdict.Prefix // each inside the one before
	var at netip.Addr         // the first address not decided; invalid behind the last of a family
	until := func(end netip.Addr, allow bool) {
		if !at.IsValid() || end.Less(at) {
			return
		}
		if n := len(out); allow && n > 0 && out[n-1].last.Next() == at {
			out[n-1].last = end
		} else if allow {
			out = append(out, span{at, end})
		}
		at = end.Next()
	}
	closeOne := func() {
		top := open[len(open)-1]
		open = open[:len(open)-1]
		until(last(top.Prefix), top.Verdict.Allow)
	}
	for _, p := range sorted {
		for len(open) > 0 && !open[len(open)-1].Prefix.Contains(p.Prefix.Addr()) {
			closeOne()
		}
		if len(open) > 0 && p.Prefix.Addr().Prev().IsValid() {
			until(p.Prefix.Addr().Prev(), open[len(open)-1].Verdict.Allow)
		}
		at = p.Prefix.Addr()
		open = append(open, p)
	}
	for len(open) > 0 {
		closeOne()
	}
	return out
}

// last is the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
