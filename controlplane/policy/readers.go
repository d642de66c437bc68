package policy

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/selection"
)

// readers knows for everything that a compilation may read which subjects have read it, so that a change finds the subjects that it concerns
// without asking all of them.
type readers struct {
	groups  map[string]*group     // by groupKey
	byLabel map[label]set[*group] // groups whose namespaces must have one of these labels
	wide    set[*group]           // groups of which no label is known that their namespaces must have
	labeled map[label]set[*namespace]

	egress         map[spiffeid.ID]set[*Subject]
	ports          map[spiffeid.ID]set[*Subject]
	byAddress      set[*Subject]
	namedByAddress set[*Subject]
}

// label is one label of a namespace.
type label struct{ key, value string }

// group is all selectors that choose namespaces alike, with those who use them.
type group struct {
	like     *peerSelector // any of them
	members  set[*namespace]
	readers  map[string]*reading // by peerSelector.key
	policies set[*netpol]        // with egress rules that select so
}

// reading is a selector and the subjects that were compiled with it.
type reading struct {
	selector *peerSelector
	subjects set[*Subject]
}

func newReaders() readers {
	return readers{
		groups: map[string]*group{}, byLabel: map[label]set[*group]{}, labeled: map[label]set[*namespace]{},
		egress: map[spiffeid.ID]set[*Subject]{}, ports: map[spiffeid.ID]set[*Subject]{},
	}
}

// groupKey is equal for selectors that choose namespaces alike.
func (p *peerSelector) groupKey() string {
	if p.namespaces == nil {
		return "ns=" + p.namespace
	}
	return "namespaces=" + p.namespaces.text
}

// needs lists labels of which a namespace must have one to match; none: it may match without any.
func (p *peerSelector) needs() []label {
	for i := range p.namespaces.requirements {
		r := &p.namespaces.requirements[i]
		switch r.Operator() {
		case selection.Equals, selection.DoubleEquals, selection.In:
			var out []label
			for v := range r.Values() {
				out = append(out, label{r.Key(), v})
			}
			return out
		}
	}
	return nil
}

// namespacesOf lists the namespaces that a selector chooses.
func (x *Index) namespacesOf(s *peerSelector) []*namespace {
	if s.namespaces == nil {
		if ns := x.namespaces[s.namespace]; ns != nil {
			return []*namespace{ns}
		}
		return nil
	}
	if g := x.readers.groups[s.groupKey()]; g != nil {
		return slices.AppendSeq(make([]*namespace, 0, g.members.len()), g.members.all())
	}
	var out []*namespace
	needs := s.needs()
	if len(needs) == 0 {
		for _, ns := range x.namespaces {
			if s.namespaceMatches(ns) {
				out = append(out, ns)
			}
		}
	}
	for _, l := range needs { // a namespace has one value for the key: it is met once
		labeled := x.readers.labeled[l]
		for ns := range labeled.all() {
			if s.namespaceMatches(ns) {
				out = append(out, ns)
			}
		}
	}
	return out
}

// group returns the group of a selector, made where there is none.
func (x *Index) group(s *peerSelector) *group {
	r := &x.readers
	key := s.groupKey()
	if g := r.groups[key]; g != nil {
		return g
	}
	g := &group{like: s, readers: map[string]*reading{}}
	for _, ns := range x.namespacesOf(s) {
		g.enter(ns)
	}
	r.groups[key] = g
	if s.namespaces == nil {
		return g
	}
	needs := s.needs()
	if len(needs) == 0 {
		r.wide.add(g)
	}
	for _, l := range needs {
		add(r.byLabel, l, g)
	}
	return g
}

func (g *group) enter(ns *namespace) {
	g.members.add(ns)
	ns.groups.add(g)
}

func (g *group) leave(ns *namespace) {
	g.members.remove(ns)
	ns.groups.remove(g)
}

// release drops a group that nobody uses any more.
func (x *Index) release(g *group) {
	if len(g.readers)+g.policies.len() > 0 {
		return
	}
	r := &x.readers
	delete(r.groups, g.like.groupKey())
	for ns := range g.members.all() {
		ns.groups.remove(g)
	}
	if g.like.namespaces == nil {
		return
	}
	r.wide.remove(g)
	for _, l := range g.like.needs() {
		remove(r.byLabel, l, g)
	}
}

// begin enters a new namespace, which has no labels yet.
func (r *readers) begin(ns *namespace) {
	if g := r.groups["ns="+ns.name]; g != nil {
		g.enter(ns)
	}
	for g := range r.wide.all() {
		if g.like.namespaceMatches(ns) {
			g.enter(ns)
		}
	}
}

// relabel follows the labels of a namespace and returns the groups that it has come into or gone out of.
func (r *readers) relabel(ns *namespace, before map[string]string) []*group {
	maybe := map[*group]struct{}{}
	for g := range ns.groups.all() {
		maybe[g] = struct{}{}
	}
	for g := range r.wide.all() {
		maybe[g] = struct{}{}
	}
	for k, v := range before {
		remove(r.labeled, label{k, v}, ns)
	}
	for k, v := range ns.labels {
		add(r.labeled, label{k, v}, ns)
		groups := r.byLabel[label{k, v}]
		for g := range groups.all() {
			maybe[g] = struct{}{}
		}
	}
	var out []*group
	for g := range maybe {
		was, is := g.members.has(ns), g.like.namespaceMatches(ns)
		switch {
		case is && !was:
			g.enter(ns)
		case was && !is:
			g.leave(ns)
		default:
			continue
		}
		out = append(out, g)
	}
	return out
}

// read enters what a subject was compiled with, in place of what it was compiled with before.
func (x *Index) read(s *Subject, u uses) {
	before := s.uses
	s.uses = u
	r := &x.readers
	for _, sel := range u.selectors {
		g := x.group(sel)
		by := g.readers[sel.key]
		if by == nil {
			by = &reading{selector: sel}
			g.readers[sel.key] = by
		}
		by.subjects.add(s)
	}
	for _, id := range u.egress {
		add(r.egress, id, s)
	}
	for _, id := range u.ports {
		add(r.ports, id, s)
	}
	if u.byAddress {
		r.byAddress.add(s)
	}
	if u.namedByAddress {
		r.namedByAddress.add(s)
	}
	x.unread(s, before)
}

// unread takes a subject out wherever it was entered and is not any more by what it uses now.
func (x *Index) unread(s *Subject, before uses) {
	r := &x.readers
	for _, sel := range before.selectors {
		if _, still := slices.BinarySearchFunc(s.uses.selectors, sel, compareSelectors); still {
			continue
		}
		g := r.groups[sel.groupKey()]
		by := g.readers[sel.key]
		if by.subjects.remove(s); by.subjects.len() == 0 {
			delete(g.readers, sel.key)
			x.release(g)
		}
	}
	for _, id := range before.egress {
		if _, still := slices.BinarySearchFunc(s.uses.egress, id, compareIDs); !still {
			remove(r.egress, id, s)
		}
	}
	for _, id := range before.ports {
		if _, still := slices.BinarySearchFunc(s.uses.ports, id, compareIDs); !still {
			remove(r.ports, id, s)
		}
	}
	if !s.uses.byAddress {
		r.byAddress.remove(s)
	}
	if !s.uses.namedByAddress {
		r.namedByAddress.remove(s)
	}
}

func compareSelectors(a, b *peerSelector) int { return strings.Compare(a.key, b.key) }

// follow enters or takes out the egress rules of a policy.
func (x *Index) follow(old, p *netpol) {
	for _, s := range p.egressSelectors() {
		x.group(s).policies.add(p)
	}
	for _, s := range old.egressSelectors() {
		if g := x.readers.groups[s.groupKey()]; g != nil { // else another of its selectors was the last
			g.policies.remove(old)
			x.release(g)
		}
	}
}

func (p *netpol) egressSelectors() (out []*peerSelector) {
	if p == nil || !p.egress.isolates {
		return nil
	}
	for i := range p.egress.rules {
		out = append(out, p.egress.rules[i].selectors...)
	}
	return out
}

func mark(c *change, subjects set[*Subject]) {
	for s := range subjects.all() {
		c.subjects[s.Key] = true
	}
}
