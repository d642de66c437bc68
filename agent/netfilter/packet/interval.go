package packet

import (
	"net/netip"

	"github.com/mantlet/mantlet/verdict"
)

// interval is a range of addresses of one family, both ends included.
type interval struct{ first, last netip.Addr }

// String is the same in every process; what fmt makes of unexported fields is not, as it tells of pointers.
func (i interval) String() string { return i.first.String() + "-" + i.last.String() }

// whole reports whether the interval is every address of its family.
func (i interval) whole() bool { return !i.first.Prev().IsValid() && !i.last.Next().IsValid() }

// flatten turns prefixes, of which the longest decides, into the intervals of allowed addresses: sorted, neither overlapping nor touching.
// The prefixes come sorted by address, then length, so that a prefix comes before those inside it.
func flatten(prefixes []verdict.PacketPrefix) (v4, v6 []interval) {
	add := func(first, last netip.Addr) {
		list := &v4
		if first.Is6() {
			list = &v6
		}
		if n := len(*list); n > 0 && (*list)[n-1].last.Next() == first {
			(*list)[n-1].last = last
			return
		}
		*list = append(*list, interval{first, last})
	}
	// around are the prefixes that hold the current address, each with the first address that it still has to say something of.
	type level struct {
		verdict.PacketPrefix
		from netip.Addr
	}
	var around []level
	leave := func() {
		l := around[len(around)-1]
		around = around[:len(around)-1]
		end := last(l.Prefix)
		if l.Allow && l.from.IsValid() && l.from.Compare(end) <= 0 {
			add(l.from, end)
		}
		if n := len(around); n > 0 {
			around[n-1].from = end.Next() // invalid where the family ends: nothing is left to say
		}
	}
	for _, p := range prefixes {
		for len(around) > 0 && !around[len(around)-1].Prefix.Contains(p.Prefix.Addr()) {
			leave()
		}
		if n := len(around); n > 0 {
			if l := around[n-1]; l.Allow && l.from.IsValid() && l.from.Less(p.Prefix.Addr()) {
				add(l.from, p.Prefix.Addr().Prev())
			}
		}
		around = append(around, level{p, p.Prefix.Addr()})
	}
	for len(around) > 0 {
		leave()
	}
	return v4, v6
}

// last is the last address of a masked prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
