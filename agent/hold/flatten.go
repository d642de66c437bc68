package hold

import (
	"net/netip"
	"slices"

	"github.com/mantlet/mantlet/verdict"
)

// span is a range of addresses of one family, both ends included.
type span struct{ first, last netip.Addr }

// whole reports whether it is every address of its family.
func (s span) whole() bool { return !s.first.Prev().IsValid() && !s.last.Next().IsValid() }

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
