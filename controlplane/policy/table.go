package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/verdict"
)

// cell is what the compiler knows of some or all pods of a peer identity: which rules admit them by selector, and what their own
// policy leaves open towards the subject.
type cell struct {
	addrs  []netip.Addr // of the pods, where rules tell the pods of an identity apart
	admits []admit
	gates  [2]*gate // the peer's own egress, for IPv4 and IPv6; nil: open
}

type admit struct {
	rule  int
	ports *portSet
}

type gate struct {
	ports  *portSet
	reason verdict.Reason
}

// peerIdentity is a peer that the table lists by name.
type peerIdentity struct {
	id    spiffeid.ID
	apart bool // rules tell its pods apart: addresses decide too, and a pod that has none yet is admitted nowhere
	cells []cell
}

// portedArea is what a rule admits by address, with its ports.
type portedArea struct {
	area
	ports *portSet
}

// draft is everything that one isolated direction of a subject says, before it is laid out by port.
type draft struct {
	rules        []verdict.Rule
	reasons      []verdict.Reason // of the rules, by the same index
	identities   []peerIdentity   // sorted by ID
	identified   []portedArea     // admit peers with an identity by address
	anonymous    []portedArea     // admit peers without one by address
	closed       []netip.Prefix   // here anonymous does not reach; only known does
	closedReason verdict.Reason
	retired      []retiredPeer
	bound        *boundPeers // nil: none
	known        []cell      // peers without identity that are known by their addresses
}

// family indexes cell.gates.
func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// layout turns a draft into blocks: it cuts the ports where any set begins or ends, and groups the pieces for which every set
// answers alike, so that ports with the same peers share one list.
func (d *draft) layout(isolating []string) verdict.Table {
	t := verdict.Table{Isolating: isolating, Rules: d.rules, Reasons: []verdict.Reason{}, Blocks: []verdict.Block{}}
	reasons := map[verdict.Reason]int{}
	intern := func(r verdict.Reason) int {
		i, ok := reasons[r]
		if !ok {
			i = len(t.Reasons)
			reasons[r] = i
			t.Reasons = append(t.Reasons, r)
		}
		return i
	}
	sets := d.portSets()
	for _, proto := range verdict.Protocols {
		bySignature := map[string]int{}
		byPeers := map[string]int{}
		var blocks []verdict.Block
		for _, piece := range pieces(sets, proto) {
			sig := signature(sets, proto, piece.First)
			i, seen := bySignature[sig]
			if !seen {
				peers := d.peersAt(proto, piece.First, intern)
				i = -1
				if !peers.empty() {
					key := (*verdict.Peers)(&peers).Hash()
					var known bool
					if i, known = byPeers[key]; !known {
						i = len(blocks)
						byPeers[key] = i
						blocks = append(blocks, verdict.Block{Protocol: proto, Peers: verdict.Peers(peers)})
					}
				}
				bySignature[sig] = i
			}
			if i >= 0 {
				blocks[i].Ports = normalize(append(blocks[i].Ports, piece))
			}
		}
		t.Blocks = append(t.Blocks, blocks...)
	}
	return t
}

// portSets lists every distinct set that the draft mentions, in a fixed order.
func (d *draft) portSets() []*portSet {
	var out []*portSet
	seen := map[*portSet]bool{}
	add := func(s *portSet) {
		if s != nil && !seen[s] {
			seen[s] = true
			out = append(out, s)
		}
	}
	cells := func(cs []cell) {
		for i := range cs {
			for _, a := range cs[i].admits {
				add(a.ports)
			}
			for _, g := range cs[i].gates {
				if g != nil {
					add(g.ports)
				}
			}
		}
	}
	for i := range d.identities {
		cells(d.identities[i].cells)
	}
	for _, a := range d.identified {
		add(a.ports)
	}
	for _, a := range d.anonymous {
		add(a.ports)
	}
	cells(d.known)
	return out
}

// pieces cuts 1..65535 at every boundary of the sets.
func pieces(sets []*portSet, proto verdict.Protocol) []verdict.PortRange {
	cuts := []int{1, 65536}
	for _, s := range sets {
		for _, r := range s[proto] {
			cuts = append(cuts, int(r.First), int(r.Last)+1)
		}
	}
	slices.Sort(cuts)
	cuts = slices.Compact(cuts)
	var out []verdict.PortRange
	for i := 0; i+1 < len(cuts); i++ {
		out = append(out, verdict.PortRange{First: uint16(cuts[i]), Last: uint16(cuts[i+1] - 1)})
	}
	return out
}

func signature(sets []*portSet, proto verdict.Protocol, port uint16) string {
	var b strings.Builder
	for _, s := range sets {
		if s.has(proto, port) {
			b.WriteByte('1')
		} else {
			b.WriteByte('0')
		}
	}
	return b.String()
}

type peers verdict.Peers

func (p *peers) empty() bool {
	return len(p.ByIdentity) == 0 && len(p.Identified) == 0 && len(p.Anonymous) == 0
}

// outcome of one cell at one port in one family.
type outcome struct {
	falls   bool // no rule names the cell: the address decides, by the region
	verdict verdict.Verdict
}

func (d *draft) peersAt(proto verdict.Protocol, port uint16, intern func(verdict.Reason) int) peers {
	var p peers
	allow := func(rule int) verdict.Verdict { return verdict.Verdict{Allow: true, Reason: intern(d.reasons[rule])} }
	identified := region(active(d.identified, proto, port))
	decide := func(c *cell, fam int, byAddress bool) outcome {
		g := c.gates[fam]
		open := g == nil || g.ports.has(proto, port)
		for _, a := range c.admits {
			if a.ports.has(proto, port) {
				if open {
					return outcome{verdict: allow(a.rule)}
				}
				return outcome{verdict: verdict.Verdict{Reason: intern(g.reason)}}
			}
		}
		if byAddress && !open {
			return outcome{verdict: verdict.Verdict{Reason: intern(g.reason)}}
		}
		return outcome{falls: true}
	}
	prefixes := func(entries []regionEntry, fam int) []verdict.Prefix {
		var out []verdict.Prefix
		for _, e := range entries {
			if fam >= 0 && family(e.prefix.Addr()) != fam {
				continue
			}
			v := verdict.Verdict{}
			switch {
			case e.rule >= 0:
				v = allow(e.rule)
			case e.carved >= 0:
				v.Reason = intern(d.excepted(e.carved))
			default:
				v.Reason = intern(d.closedReason)
			}
			out = append(out, verdict.Prefix{Prefix: e.prefix, Verdict: v})
		}
		return out
	}

	for i := range d.identities {
		id := &d.identities[i]
		entry := verdict.Identity{ID: id.id}
		var listed bool
		if !id.apart {
			c := &id.cells[0]
			o4, o6 := decide(c, 0, len(identified) > 0), decide(c, 1, len(identified) > 0)
			switch {
			case o4 == o6 && o4.falls:
				continue
			case o4 == o6:
				entry.Verdict, listed = o4.verdict, true
			default:
				for fam, o := range []outcome{o4, o6} {
					if o.falls {
						entry.Addresses = append(entry.Addresses, prefixes(identified, fam)...)
					} else {
						entry.Addresses = append(entry.Addresses, verdict.Prefix{Prefix: everywhere[fam], Verdict: o.verdict})
					}
				}
				entry.Verdict = verdict.Verdict{Reason: intern(verdict.Reason{Text: "no rule admits this peer in this address family"})}
				listed = true
			}
		} else {
			for j := range id.cells {
				c := &id.cells[j]
				for _, a := range c.addrs {
					o := decide(c, family(a), len(identified) > 0)
					if o.falls {
						rule := regionRule(identified, a)
						if rule < 0 {
							continue
						}
						o.verdict = allow(rule)
					}
					entry.Addresses = append(entry.Addresses, verdict.Prefix{Prefix: host(a), Verdict: o.verdict})
				}
			}
			listed = len(entry.Addresses) > 0 || len(identified) > 0
			if listed {
				entry.Verdict = verdict.Verdict{Reason: intern(verdict.Reason{
					Text: "rules tell the pods of this identity apart, and none of them admits the one with this address"})}
			}
		}
		if listed {
			sortPrefixes(entry.Addresses)
			p.ByIdentity = append(p.ByIdentity, entry)
		}
	}
	p.Identified = prefixes(identified, -1)
	sortPrefixes(p.Identified)
	p.bind(d.bound, intern)
	for _, r := range d.retired {
		p.retire(r, intern)
	}

	p.Anonymous = d.addKnown(prefixes(without(region(active(d.anonymous, proto, port)), d.closed), -1), decide)
	sortPrefixes(p.Anonymous)
	return p
}

// addKnown adds the pods without identity that are known by address to what areas admit. One of them goes before whatever the areas
// say of its very address; that lies in a closed network, so that a known pod which no rule admits at this port needs no entry.
func (d *draft) addKnown(areas []verdict.Prefix, decide func(*cell, int, bool) outcome) []verdict.Prefix {
	own := map[netip.Prefix]bool{}
	var out []verdict.Prefix
	for i := range d.known {
		c := &d.known[i]
		for _, a := range c.addrs {
			if o := decide(c, family(a), false); !o.falls {
				own[host(a)] = true
				out = append(out, verdict.Prefix{Prefix: host(a), Verdict: o.verdict})
			}
		}
	}
	for _, p := range areas {
		if !own[p.Prefix] {
			out = append(out, p)
		}
	}
	return out
}

// excepted is the reason of addresses that a rule's ipBlock holds and excepts again.
func (d *draft) excepted(rule int) verdict.Reason {
	r := d.rules[rule]
	return verdict.Reason{Policy: r.Policy, Rule: r.Rule, Text: fmt.Sprintf("%s of %s excepts the address: it admits %s on %s", r.Rule, r.Policy, r.Peers, r.Ports)}
}

// active picks the areas whose rule speaks of a port.
func active(areas []portedArea, proto verdict.Protocol, port uint16) []area {
	var out []area
	for _, a := range areas {
		if a.ports.has(proto, port) {
			out = append(out, a.area)
		}
	}
	return out
}
