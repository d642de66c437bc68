package policy

import (
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"github.com/mantlet/mantlet/verdict"
)

var everywhere = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}

// area is what one rule admits by address.
type area struct {
	rule   int
	blocks []ipBlock
}

// regionEntry says which rule admits the addresses for which its prefix is the longest that holds them; -1: none. carved is then
// the rule with the ipBlock that excepts them; -1: they are closed for another reason.
type regionEntry struct {
	prefix netip.Prefix
	rule   int
	carved int
}

// region flattens ipBlocks and their exceptions into prefixes of which the longest decides. Every prefix that begins or ends an
// admission (a cidr or an except) is a boundary; between a boundary and the ones inside it membership is constant, so that
// asking once per boundary is exact. Where several areas admit, the first does. Boundaries that change nothing are left out; so is
// "none" where nothing shorter admits.
func region(areas []area) []regionEntry {
	if len(areas) == 0 {
		return nil
	}
	type admission struct {
		rule  int
		block *ipBlock
	}
	admissions := new(bart.Table[[]admission])
	boundaries := new(bart.Table[struct{}])
	for _, a := range areas {
		for i := range a.blocks {
			b := &a.blocks[i]
			list, _ := admissions.Get(b.cidr)
			admissions.Insert(b.cidr, append(list, admission{a.rule, b}))
			boundaries.Insert(b.cidr, struct{}{})
			for _, e := range b.except {
				boundaries.Insert(e, struct{}{})
			}
		}
	}
	decided := new(bart.Table[int])
	var out []regionEntry
	// In sorted order a prefix comes before all prefixes inside it, so that its parent is decided when it is asked.
	for p := range boundaries.AllSorted() {
		rule, carved := -1, -1
		for _, list := range admissions.Supernets(p) {
			for _, a := range list {
				least := &rule
				if excepts(a.block, p) {
					least = &carved
				}
				if *least < 0 || a.rule < *least {
					*least = a.rule
				}
			}
		}
		parent := -1
		if v, ok := decided.LookupPrefix(p); ok {
			parent = v
		}
		if rule != parent {
			decided.Insert(p, rule)
			out = append(out, regionEntry{p, rule, carved})
		}
	}
	return out
}

func excepts(b *ipBlock, p netip.Prefix) bool {
	return slices.ContainsFunc(b.except, func(e netip.Prefix) bool { return e.Bits() <= p.Bits() && e.Contains(p.Addr()) })
}

// regionRule looks an address up.
func regionRule(entries []regionEntry, a netip.Addr) int {
	rule, bits := -1, -1
	for _, e := range entries {
		if e.prefix.Bits() > bits && e.prefix.Contains(a) {
			rule, bits = e.rule, e.prefix.Bits()
		}
	}
	return rule
}

// without cuts the given networks out of a region: inside them nothing is admitted.
func without(entries []regionEntry, networks []netip.Prefix) []regionEntry {
	var out []regionEntry
	for _, e := range entries {
		if !slices.ContainsFunc(networks, func(n netip.Prefix) bool { return n.Bits() <= e.prefix.Bits() && n.Contains(e.prefix.Addr()) }) {
			out = append(out, e)
		}
	}
	for _, n := range networks {
		if regionRule(out, n.Addr()) >= 0 {
			out = append(out, regionEntry{n, -1, -1})
		}
	}
	return out
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func sortPrefixes(ps []verdict.Prefix) {
	slices.SortFunc(ps, func(a, b verdict.Prefix) int {
		if c := a.Prefix.Addr().Compare(b.Prefix.Addr()); c != 0 {
			return c
		}
		return a.Prefix.Bits() - b.Prefix.Bits()
	})
}
