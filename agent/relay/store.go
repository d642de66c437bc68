package relay

import (
	"cmp"
	"maps"
	"slices"
	"strings"
)

// kind is what the relay knows of the resources of one type.
type kind struct {
	url     string
	entries map[string]*entry
	// complete: Envoy has answered for all that there is, so that what is here is all there is to give to the next.
	complete bool

	// Of Envoy's stream:
	asked      bool // Envoy has named the type
	wildcard   bool // it wants all that there is
	unanswered int  // responses that it has neither ACKed nor NACKed

	// Of the control plane's stream:
	open       bool            // the type has been named there
	wildcarded bool            // and all that there is was subscribed to
	moved      map[string]bool // names whose subscription is to be looked at
}

// entry is one resource, by its name. It is there as long as one side holds it or wants it.
type entry struct {
	kind *kind
	name string

	// good is the last good one, which Envoy has ACKed: what an Envoy that starts anew is given. An on-demand cluster that Envoy has no
	// part in (an answer to the agent's question without endpoints, or Envoy is away) is good at once; in the latter case untried.
	good    *resource
	untried bool
	// latest is what the control plane sent last, Envoy's answer outstanding; where Envoy refused it, good. With answered and without latest
	// there is no such resource.
	latest   *resource
	answered bool
	refusal  string // Envoy's, of what was sent last; empty: it has not refused that

	// Of Envoy:
	held       string  // version that it holds; empty: none
	sent       string  // version that it will hold once it has ACKed what is on its way
	maybe      bool    // it may hold more than that: it applies of a response that it refuses what it can
	doubt      bool    // it was sent a denial in a response that it refused, and nothing newer that it has ACKed
	flight     *flight // the last response that carries it, until it is answered
	subscribed bool    // by name
	due        bool    // it waits for an answer

	// Of the control plane's stream:
	listed  bool // subscribed to by name
	again   bool // to be subscribed to once more, for what the first answer brought is gone
	leaving bool // unsubscribed from; as that was below a wildcard, a response is to come that says so

	question *question // nil: the agent does not ask
}

func (k *kind) entry(name string) *entry {
	e := k.entries[name]
	if e == nil {
		e = &entry{kind: k, name: name}
		k.entries[name] = e
	}
	return e
}

// sorted returns the entries in the order of their names.
func (k *kind) sorted() []*entry {
	list := slices.Collect(maps.Values(k.entries))
	slices.SortFunc(list, func(a, b *entry) int { return strings.Compare(a.name, b.name) })
	return list
}

// settle drops an entry that nobody has to do with any more.
func (k *kind) settle(e *entry) {
	if e.good == nil && e.held == "" && !e.present() && e.flight == nil && !e.subscribed && !e.listed && !e.leaving && e.question == nil {
		delete(k.entries, e.name)
	}
}

// present reports whether Envoy may hold it, now or once it has answered what is on its way.
func (e *entry) present() bool { return e.sent != "" || e.maybe }

// onDemand reports whether the entry is an on-demand cluster.
func (e *entry) onDemand() bool { return onDemand(e.kind.url, e.name) }

// reachable reports whether a resource is an on-demand cluster with endpoints, as far as the agent can read it.
func reachable(r *resource) bool { return r != nil && r.endpoints > 0 && r.unreadable == nil }

// forEnvoy is what Envoy is to hold of what is good; nil: nothing. A cluster costs it 38 to 68 KB: one without endpoints is for those
// who asked for it.
func (e *entry) forEnvoy() *resource {
	switch {
	case !e.kind.wildcard && !e.subscribed, e.good == nil:
		return nil
	case e.onDemand() && !e.subscribed && !e.present() && !reachable(e.good):
		return nil
	}
	return e.good
}

// wanted reports whether the control plane is to be asked for this name, apart from a wildcard: one side asks, or Envoy holds it because the one
// before it did.
func (e *entry) wanted() bool {
	return e.subscribed || e.question != nil || e.onDemand() && e.kind.asked && e.kind.wildcard && (e.sent != "" || reachable(e.good))
}

// holds reports whether the control plane is to be told that this resource is here: Envoy has it, or it is the agent's alone.
func (e *entry) holds(envoy bool) bool {
	switch {
	case e.good == nil:
		return false
	case e.held == e.good.version:
		return true
	case !e.onDemand() || e.question == nil:
		return false
	}
	return !envoy || !e.subscribed && !e.present() && !reachable(e.good)
}

// version of a resource; empty: there is none.
func version(r *resource) string {
	if r == nil {
		return ""
	}
	return r.version
}

// rank is the order of types: what is pointed at goes before what points at it.
func rank(url string) int {
	switch url {
	case TypeCluster:
		return 0
	case TypeExtension:
		return 2
	case TypeListener:
		return 3
	}
	return 1
}

func byRank(a, b *kind) int {
	return cmp.Or(cmp.Compare(rank(a.url), rank(b.url)), strings.Compare(a.url, b.url))
}
