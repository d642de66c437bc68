package policy

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/selection"
)

// readers knows for everything that a compilation may read which subjects have read it, so that a change finds the subjects that it concerns
// without asking all of them.
type readers struct {
	groups  map[string]*group             // by groupKey
	byLabel map[label]map[*group]struct{} // groups whose namespaces must have one of these labels
	wide    map[*group]struct{}           // groups of which no label is known that their namespaces must have
	labeled map[label]map[*namespace]struct{}

	egress         map[spiffeid.ID]map[*Subject]struct{}
	ports          map[spiffeid.ID]map[*Subject]struct{}
	byAddress      map[*Subject]struct{}
	namedByAddress map[*Subject]struct{}
}

// label is one label of a namespace.
type label struct{ key, value string }

// group is all selectors that choose namespaces alike, with those who use them.
type group struct {
	like     *peerSelector // any of them
	members  map[*namespace]struct{}
	readers  map[string]*reading  // by peerSelector.key
	policies map[*netpol]struct{} // with egress rules that select so
}

// reading is a selector and the subjects that were compiled with it.
type reading struct {
	selector *peerSelector
	subjects map[*Subject]struct{}
}

func newReaders() readers {
	return readers{
		groups: map[string]*group{}, byLabel: map[label]map[*group]struct{}{}, wide: map[*group]struct{}{}, labeled: map[label]map[*namespace]struct{}{},
		egress: map[spiffeid.ID]map[*Subject]struct{}{}, ports: map[spiffeid.ID]map[*Subject]struct{}{},
		byAddress: map[*Subject]struct{}{}, namedByAddress: map[*Subject]struct{}{},
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
		out := make([]*namespace, 0, len(g.members))
		for ns := range g.members {
			out = append(out, ns)
		}
		return out
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
		for ns := range x.readers.labeled[l] {
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
	g := &group{like: s, members: map[*namespace]struct{}{}, readers: map[string]*reading{}, policies: map[*netpol]struct{}{}}
	for _, ns := range x.namespacesOf(s) {
		g.enter(ns)
	}
	r.groups[key] = g
	if s.namespaces == nil {
		return g
	}
	needs := s.needs()
	if len(needs) == 0 {
		r.wide[g] = struct{}{}
	}
	for _, l := range needs {
		add(r.byLabel, l, g)
	}
	return g
}

func (g *group) enter(ns *namespace) {
	g.members[ns] = struct{}{}
	ns.groups[g] = struct{}{}
}

func (g *group) leave(ns *namespace) {
	delete(g.members, ns)
	delete(ns.groups, g)
}

// release drops a group that nobody uses any more.
func (x *Index) release(g *group) {
	if len(g.readers)+len(g.policies) > 0 {
		return
	}
	r := &x.readers
	delete(r.groups, g.like.groupKey())
	for ns := range g.members {
		delete(ns.groups, g)
	}
	if g.like.namespaces == nil {
		return
	}
	delete(r.wide, g)
	for _, l := range g.like.needs() {
		remove(r.byLabel, l, g)
	}
}

// begin enters a new namespace, which has no labels yet.
func (r *readers) begin(ns *namespace) {
	if g := r.groups["ns="+ns.name]; g != nil {
		g.enter(ns)
	}
	for g := range r.wide {
		if g.like.namespaceMatches(ns) {
			g.enter(ns)
		}
	}
}

// relabel follows the labels of a namespace and returns the groups that it has come into or gone out of.
func (r *readers) relabel(ns *namespace, before map[string]string) []*group {
	maybe := map[*group]struct{}{}
	for g := range ns.groups {
		maybe[g] = struct{}{}
	}
	for g := range r.wide {
		maybe[g] = struct{}{}
	}
	for k, v := range before {
		remove(r.labeled, label{k, v}, ns)
	}
	for k, v := range ns.labels {
		add(r.labeled, label{k, v}, ns)
		for g := range r.byLabel[label{k, v}] {
			maybe[g] = struct{}{}
		}
	}
	var out []*group
	for g := range maybe {
		_, was := g.members[ns]
		is := g.like.namespaceMatches(ns)
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
	for key, sel := range u.selectors {
		g := x.group(sel)
		if g.readers[key] == nil {
			g.readers[key] = &reading{sel, map[*Subject]struct{}{}}
		}
		g.readers[key].subjects[s] = struct{}{}
	}
	for id := range u.egress {
		add(r.egress, id, s)
	}
	for id := range u.ports {
		add(r.ports, id, s)
	}
	if u.byAddress {
		r.byAddress[s] = struct{}{}
	}
	if u.namedByAddress {
		r.namedByAddress[s] = struct{}{}
	}
	x.unread(s, before)
}

// unread takes a subject out wherever it was entered and is not any more by what it uses now.
func (x *Index) unread(s *Subject, before uses) {
	r := &x.readers
	for key, sel := range before.selectors {
		if s.uses.selectors[key] != nil {
			continue
		}
		g := r.groups[sel.groupKey()]
		delete(g.readers[key].subjects, s)
		if len(g.readers[key].subjects) == 0 {
			delete(g.readers, key)
			x.release(g)
		}
	}
	for id := range before.egress {
		if !s.uses.egress[id] {
			remove(r.egress, id, s)
		}
	}
	for id := range before.ports {
		if !s.uses.ports[id] {
			remove(r.ports, id, s)
		}
	}
	if !s.uses.byAddress {
		delete(r.byAddress, s)
	}
	if !s.uses.namedByAddress {
		delete(r.namedByAddress, s)
	}
}

// follow enters or takes out the egress rules of a policy.
func (x *Index) follow(old, p *netpol) {
	for _, s := range p.egressSelectors() {
		x.group(s).policies[p] = struct{}{}
	}
	for _, s := range old.egressSelectors() {
		if g := x.readers.groups[s.groupKey()]; g != nil { // else another of its selectors was the last
			delete(g.policies, old)
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

func mark(c *change, subjects map[*Subject]struct{}) {
	for s := range subjects {
		c.subjects[s.Key] = true
	}
}

func add[K, V comparable](m map[K]map[V]struct{}, k K, v V) {
	if m[k] == nil {
		m[k] = map[V]struct{}{}
	}
	m[k][v] = struct{}{}
}

func remove[K, V comparable](m map[K]map[V]struct{}, k K, v V) {
	delete(m[k], v)
	if len(m[k]) == 0 {
		delete(m, k)
	}
}
