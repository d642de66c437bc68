package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/verdict"
)

// compile computes the verdicts of a subject from one of its pods, and notes in uses what it read, so that the Index knows which
// later changes concern the subject.
func (x *Index) compile(s *Subject, uses *uses) *verdict.Verdicts {
	d := s.any()
	return &verdict.Verdicts{Subject: s.ID, Mode: s.Mode, Ingress: x.compileIngress(d, s.Mode, uses), Egress: x.compileEgress(d, uses)}
}

// open is the table of a direction in which no policy isolates.
func open(text string, anonymous []netip.Prefix) verdict.Table {
	t := verdict.Table{Reasons: []verdict.Reason{{Text: text}}}
	allow := func(ps []netip.Prefix) (out []verdict.Prefix) {
		for _, p := range ps {
			out = append(out, verdict.Prefix{Prefix: p, Verdict: verdict.Verdict{Allow: true}})
		}
		return out
	}
	for _, proto := range verdict.Protocols {
		t.Blocks = append(t.Blocks, verdict.Block{Protocol: proto, Ports: []verdict.PortRange{verdict.AllPorts},
			Peers: verdict.Peers{Identified: allow(everywhere), Anonymous: allow(anonymous)}})
	}
	return t
}

// ruleSet is the rules of all policies that isolate a pod in one direction, in order of policy and index.
type ruleSet struct {
	isolating []string
	rules     []*rule
	words     []verdict.Rule
	reasons   []verdict.Reason
}

// newRuleSet collects the rules. named holds the ports of the pod that port names speak of: the subject's at ingress; at egress
// each destination has its own.
func newRuleSet(policies []*netpol, side func(*netpol) *direction, named []namedPort) ruleSet {
	var rs ruleSet
	for _, p := range policies {
		rs.isolating = append(rs.isolating, p.key)
		dir := side(p)
		for i := range dir.rules {
			r := &dir.rules[i]
			rs.rules = append(rs.rules, r)
			words := r.describe(p.key, named)
			rs.words = append(rs.words, words)
			rs.reasons = append(rs.reasons, admits(words))
		}
	}
	return rs
}

func ingressOf(p *netpol) *direction { return &p.ingress }
func egressOf(p *netpol) *direction  { return &p.egress }

func (x *Index) compileIngress(d *pod, mode verdict.Mode, uses *uses) verdict.Table {
	policies := x.isolating(d, ingressOf)
	if len(policies) == 0 {
		if mode == verdict.Strict {
			return open("no policy isolates the workload for ingress", nil)
		}
		return open("no policy isolates the workload for ingress", everywhere)
	}
	rs := newRuleSet(policies, ingressOf, d.ports)
	dr := draft{rules: rs.words, reasons: rs.reasons, closed: x.closedNetworks()}
	resolved := make([]*portSet, len(rs.rules))
	byAddress := false // some rule admits by address: then the egress policy of every identity counts
	for i, r := range rs.rules {
		resolved[i] = r.ports.at(d.ports)
		blocks := r.blocks
		if r.anyone {
			blocks = anywhere
		}
		if len(blocks) == 0 {
			continue
		}
		byAddress = true
		a := portedArea{area{i, blocks}, resolved[i]}
		dr.identified = append(dr.identified, a)
		if mode == verdict.Permissive || !r.anyone {
			dr.anonymous = append(dr.anonymous, a)
		}
	}
	dr.closedReason = verdict.Reason{Text: "plaintext from the pod network, and not from a pod without sidecar that a rule admits"}
	if mode == verdict.Strict {
		dr.closedReason.Text = "plaintext from the pod network, which a strict workload never accepts"
	}
	gates := gateCache{}
	ids := x.candidates(rs.rules, uses)
	if byAddress {
		uses.byAddress = true
		for id := range x.egressIsolated {
			ids[x.identities[id]] = true
		}
	}
	for _, id := range sortedIdentities(ids) {
		uses.egress = append(uses.egress, id.id)
		p := peerIdentity{id: id.id, apart: x.tellsApart(rs.rules, id) || x.egressTellsApart(id)}
		pods := []*pod{id.any()}
		if p.apart {
			pods = id.sorted()
		}
		for _, peer := range pods {
			c := cell{gates: x.gatesTowards(peer, d, gates), addrs: x.owned(peer)}
			for i, r := range rs.rules {
				if x.selects(r, peer) {
					c.admits = append(c.admits, admit{i, resolved[i]})
				}
			}
			p.cells = append(p.cells, c)
		}
		dr.identities = append(dr.identities, p)
	}
	if mode == verdict.Permissive {
		dr.known = x.knownPlaintext(d, rs.rules, resolved, ids, gates)
	}
	dr.retired, dr.bound = x.retiredPeers(), x.boundPeers()
	return dr.layout(rs.isolating)
}

// closedNetworks is where a peer without identity must be a known pod: the pod network, and the addresses of pods outside of it.
func (x *Index) closedNetworks() []netip.Prefix {
	out := slices.Clone(x.podNetwork)
	for _, a := range slices.SortedFunc(maps.Keys(x.outside), netip.Addr.Compare) {
		out = append(out, host(a))
	}
	return out
}

// anywhere is the area of a rule that lists no peers.
var anywhere = []ipBlock{{cidr: everywhere[0]}, {cidr: everywhere[1]}}

// knownPlaintext lists the pods without a sidecar that some rule admits: permissive subjects know them by address.
func (x *Index) knownPlaintext(d *pod, rules []*rule, resolved []*portSet, covered map[*ident]bool, gates gateCache) []cell {
	var out []cell
	for _, peer := range x.plainPods(rules, covered) {
		for _, a := range x.owned(peer) {
			c := cell{addrs: []netip.Addr{a}, gates: x.gatesTowards(peer, d, gates)}
			for i, r := range rules {
				if r.anyone || x.selects(r, peer) || slices.ContainsFunc(r.blocks, func(b ipBlock) bool { return b.contains(a) }) {
					c.admits = append(c.admits, admit{i, resolved[i]})
				}
			}
			if len(c.admits) > 0 {
				out = append(out, c)
			}
		}
	}
	return out
}

// gateCache keeps what a list of egress policies leaves open towards the subject that is being compiled.
type gateCache map[string][2]*gate

// gatesTowards is the egress policy of a peer pod towards the subject's pod, per address family: ipBlocks go by the subject's
// address of that family.
func (x *Index) gatesTowards(peer, d *pod, cache gateCache) [2]*gate {
	policies := x.isolating(peer, egressOf)
	if len(policies) == 0 {
		return [2]*gate{}
	}
	names := make([]string, len(policies))
	for i, p := range policies {
		names[i] = p.key
	}
	key := strings.Join(names, ",")
	if g, ok := cache[key]; ok {
		return g
	}
	var g [2]*gate
	reason := verdict.Reason{Policy: names[0], Text: fmt.Sprintf("egress of the peer is isolated by %s, and no rule there admits this destination and port", key)}
	for fam := range g {
		open := &portSet{}
		for _, p := range policies {
			for i := range p.egress.rules {
				r := &p.egress.rules[i]
				if r.anyone || x.selects(r, d) || slices.ContainsFunc(r.blocks, func(b ipBlock) bool {
					return slices.ContainsFunc(d.ips, func(a netip.Addr) bool { return family(a) == fam && b.contains(a) })
				}) {
					open.union(r.ports.at(d.ports))
				}
			}
		}
		g[fam] = &gate{ports: open, reason: reason}
	}
	// One gate where the families agree keeps the number of distinct port sets small.
	if equalPorts(g[0].ports, g[1].ports) {
		g[1] = g[0]
	}
	cache[key] = g
	return g
}

func equalPorts(a, b *portSet) bool {
	for _, p := range verdict.Protocols {
		if !slices.Equal(a[p], b[p]) {
			return false
		}
	}
	return true
}

func (x *Index) compileEgress(s *pod, uses *uses) verdict.Table {
	policies := x.isolating(s, egressOf)
	if len(policies) == 0 {
		return open("no policy isolates the workload for egress", everywhere)
	}
	rs := newRuleSet(policies, egressOf, nil)
	dr := draft{rules: rs.words, reasons: rs.reasons}
	ids := x.candidates(rs.rules, uses)
	named := false // some rule names ports
	for i, r := range rs.rules {
		named = named || len(r.ports.named) > 0
		blocks := r.blocks
		if r.anyone {
			blocks = anywhere
		}
		if len(blocks) == 0 {
			continue
		}
		a := portedArea{area{i, blocks}, r.ports.fixed}
		dr.identified = append(dr.identified, a)
		dr.anonymous = append(dr.anonymous, a)
		if len(r.ports.named) > 0 {
			uses.namedByAddress = true
			for _, id := range x.identities {
				for _, p := range id.pods {
					if r.ports.namesOneOf(p.ports) {
						ids[id] = true
						break
					}
				}
			}
		}
	}
	for _, id := range sortedIdentities(ids) {
		uses.ports = append(uses.ports, id.id)
		p := peerIdentity{id: id.id, apart: x.tellsApart(rs.rules, id) || named && (id.portsDiffer() || blockNamesPortOf(rs.rules, id))}
		if !p.apart {
			p.cells = []cell{{admits: x.egressAdmits(rs.rules, id.any(), netip.Addr{})}}
			dr.identities = append(dr.identities, p)
			continue
		}
		for _, peer := range id.sorted() {
			for _, a := range x.owned(peer) {
				p.cells = append(p.cells, cell{addrs: []netip.Addr{a}, admits: x.egressAdmits(rs.rules, peer, a)})
			}
		}
		dr.identities = append(dr.identities, p)
	}
	return dr.layout(rs.isolating)
}

// egressAdmits lists the rules that admit a destination pod otherwise than by address and number alone.
func (x *Index) egressAdmits(rules []*rule, peer *pod, addr netip.Addr) []admit {
	var out []admit
	for i, r := range rules {
		if x.selects(r, peer) ||
			len(r.ports.named) > 0 && (r.anyone || slices.ContainsFunc(r.blocks, func(b ipBlock) bool { return addr.IsValid() && b.contains(addr) })) {
			out = append(out, admit{i, r.ports.at(peer.ports)})
		}
	}
	return out
}

// blockNamesPortOf reports whether a rule with ipBlocks names a port of some pod of the identity: then addresses matter.
func blockNamesPortOf(rules []*rule, id *ident) bool {
	for _, r := range rules {
		if len(r.blocks) == 0 || len(r.ports.named) == 0 {
			continue
		}
		for _, p := range id.pods {
			if r.ports.namesOneOf(p.ports) {
				return true
			}
		}
	}
	return false
}

// isolating lists the policies that isolate a pod in one direction, sorted by name.
func (x *Index) isolating(d *pod, side func(*netpol) *direction) []*netpol {
	var out []*netpol
	for _, p := range x.namespace(d.namespace).sortedPolicies() {
		if side(p).isolates && p.pods.matches(d.labels) {
			out = append(out, p)
		}
	}
	return out
}

// candidates collects the identities that a selector of the rules covers, wholly or partly.
func (x *Index) candidates(rules []*rule, uses *uses) map[*ident]bool {
	out := map[*ident]bool{}
	for _, r := range rules {
		for _, s := range r.selectors {
			uses.selectors = append(uses.selectors, s)
			for _, id := range x.covered(s) {
				out[id] = true
			}
		}
	}
	return out
}

// covered lists the identities of which a selector covers at least some pods by its stable labels.
func (x *Index) covered(s *peerSelector) []*ident {
	var out []*ident
	for _, ns := range x.namespacesOf(s) {
		for _, id := range ns.identities {
			if s.pods.covers(id.stable, x.namer.Volatile) != none {
				out = append(out, id)
			}
		}
	}
	return out
}

// selects reports whether a selector of the rule matches a pod.
func (x *Index) selects(r *rule, p *pod) bool {
	return slices.ContainsFunc(r.selectors, func(s *peerSelector) bool {
		return s.namespaceMatches(x.namespace(p.namespace)) && s.pods.matches(p.labels)
	})
}

// tellsApart reports whether a selector may match some pods of an identity and not others.
func (x *Index) tellsApart(rules []*rule, id *ident) bool {
	for _, r := range rules {
		for _, s := range r.selectors {
			if s.namespaceMatches(x.namespace(id.namespace)) && s.pods.covers(id.stable, x.namer.Volatile) == some {
				return true
			}
		}
	}
	return false
}

// egressTellsApart reports whether egress policies may isolate some pods of an identity and not others.
func (x *Index) egressTellsApart(id *ident) bool {
	for _, p := range x.namespace(id.namespace).policies {
		if p.egress.isolates && p.pods.covers(id.stable, x.namer.Volatile) == some {
			return true
		}
	}
	return false
}

func sortedIdentities(set map[*ident]bool) []*ident {
	out := make([]*ident, 0, len(set))
	for id := range set {
		out = append(out, id)
	}
	slices.SortFunc(out, func(a, b *ident) int { return compareIDs(a.id, b.id) })
	return out
}

func compareIDs(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) }
