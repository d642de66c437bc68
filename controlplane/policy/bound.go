package policy

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/verdict"
)

// Retirement is an identity that a running pod no longer has: from the pod's addresses it is refused until a time at which no certificate for it
// is good any more.
type Retirement struct {
	Pod   string // "namespace/name"
	UID   string
	ID    spiffeid.ID
	Addrs []netip.Addr
	Until time.Time
}

// Binding says in one sentence what many Retirements say, or ones that nobody knows any more: until a time the identities of a namespace are
// accepted from addresses of pods that have them, and from nowhere else.
type Binding struct {
	Namespace string // "" is every namespace
	Until     time.Time
	Why       string
}

// Bind has a Binding in force until its time (see Expire). What was retired in that namespace, and ends no later, is in it.
//
// It costs what identities otherwise save: while it lasts each pod of the namespace that comes or goes is told to whoever lists its identity.
func (x *Index) Bind(namespace string, until time.Time) Delta {
	c := newChange()
	if is, ok := x.bound[namespace]; !ok || until.After(is) {
		x.bound[namespace] = until
		if !ok {
			x.touchBound(namespace, c)
		}
	}
	for id, at := range x.retired {
		if namespace != "" && namespaceOf(id) != namespace {
			continue
		}
		before := len(at)
		maps.DeleteFunc(at, func(_ netip.Addr, end time.Time) bool { return !end.After(x.bound[namespace]) })
		if len(at) < before {
			x.touchRetired(id, c)
		}
		if len(at) == 0 {
			delete(x.retired, id)
		}
	}
	return x.finish(c)
}

// unbind ends Bindings.
func (x *Index) unbind(now time.Time, c *change) {
	for namespace, until := range x.bound {
		if !until.After(now) {
			delete(x.bound, namespace)
			x.touchBound(namespace, c)
		}
	}
}

// isBound reports whether a namespace's identities are accepted from their pods' addresses alone.
func (x *Index) isBound(namespace string) bool {
	if len(x.bound) == 0 {
		return false
	}
	_, own := x.bound[namespace]
	_, all := x.bound[""]
	return own || all
}

// touchBound marks the subjects that might admit an identity of a namespace.
func (x *Index) touchBound(namespace string, c *change) {
	mark(c, x.readers.byAddress)
	for id, subjects := range x.readers.egress {
		if namespace == "" || namespaceOf(id) == namespace {
			mark(c, subjects)
		}
	}
}

func namespaceOf(id spiffeid.ID) string {
	p, err := identity.Parse(id)
	if err != nil {
		return "" // an Index knows no such identity
	}
	return p.Namespace
}

// boundPeers are the identities that count from certain addresses only, and all addresses of pods that have one of them.
type boundPeers struct {
	holds func(spiffeid.ID) bool // whether an identity is of a bound namespace
	own   []retiredPeer          // by identity, sorted: from where it counts
	addrs []netip.Addr           // sorted
}

// boundPeers lists what Bindings say now; nil: there is none.
func (x *Index) boundPeers() *boundPeers {
	if len(x.bound) == 0 {
		return nil
	}
	b := &boundPeers{holds: func(id spiffeid.ID) bool { return x.isBound(namespaceOf(id)) }}
	for _, i := range x.identities {
		if !x.isBound(i.namespace) {
			continue
		}
		own := retiredPeer{id: i.id}
		for _, p := range i.pods {
			own.addrs = append(own.addrs, x.owned(p)...)
		}
		slices.SortFunc(own.addrs, netip.Addr.Compare)
		b.own = append(b.own, own)
		b.addrs = append(b.addrs, own.addrs...)
	}
	slices.SortFunc(b.own, func(a, b retiredPeer) int { return compareIDs(a.id, b.id) })
	slices.SortFunc(b.addrs, netip.Addr.Compare)
	return b
}

var reasonBound = verdict.Reason{Text: "identity not of this address: no pod with it has this address now, and for a while identities of its namespace count from their pods' addresses only (see mantlet status)"}

// bind has the identities of bound namespaces admitted from their pods' addresses only.
func (p *peers) bind(b *boundPeers, intern func(verdict.Reason) int) {
	if b == nil {
		return
	}
	refusal := func() verdict.Verdict { return verdict.Verdict{Reason: intern(reasonBound)} }
	out := make([]verdict.Identity, 0, len(p.ByIdentity)+len(b.own))
	own := b.own
	unlisted := func(until spiffeid.ID) {
		for len(own) > 0 && (until.IsZero() || compareIDs(own[0].id, until) < 0) {
			if e, ok := confine(verdict.Identity{ID: own[0].id, Addresses: p.Identified}, own[0].addrs, refusal); ok {
				out = append(out, e)
			}
			own = own[1:]
		}
	}
	for _, e := range p.ByIdentity {
		unlisted(e.ID)
		var from []netip.Addr
		if len(own) > 0 && own[0].id == e.ID {
			from, own = own[0].addrs, own[1:]
		}
		if b.holds(e.ID) {
			if len(e.Addresses) == 0 {
				for _, all := range everywhere {
					e.Addresses = append(e.Addresses, verdict.Prefix{Prefix: all, Verdict: e.Verdict})
				}
			}
			if confined, ok := confine(e, from, refusal); ok {
				e = confined
			}
		}
		out = append(out, e)
	}
	unlisted(spiffeid.ID{})
	p.ByIdentity = out
	// Whatever other identity is shown from a bound pod's address was one of its own.
	before := p.Identified
	p.Identified = slices.Clone(before)
	for _, a := range b.addrs {
		if !admitted(before, a) {
			continue
		}
		p.Identified = slices.DeleteFunc(p.Identified, func(e verdict.Prefix) bool { return e.Prefix == host(a) })
		p.Identified = append(p.Identified, verdict.Prefix{Prefix: host(a), Verdict: refusal()})
	}
	sortPrefixes(p.Identified)
}

// confine is an entry that admits whom it admitted from some addresses only; false: it admits nobody as it is.
func confine(e verdict.Identity, to []netip.Addr, refusal func() verdict.Verdict) (verdict.Identity, bool) {
	if !slices.ContainsFunc(e.Addresses, func(a verdict.Prefix) bool { return a.Verdict.Allow }) {
		return e, false
	}
	out := verdict.Identity{ID: e.ID, Verdict: refusal()}
	for _, a := range to {
		if v, ok := longest(e.Addresses, a); ok {
			out.Addresses = append(out.Addresses, verdict.Prefix{Prefix: host(a), Verdict: v})
		}
	}
	sortPrefixes(out.Addresses)
	return out, true
}

// longest looks an address up: the longest prefix decides.
func longest(list []verdict.Prefix, a netip.Addr) (v verdict.Verdict, ok bool) {
	bits := -1
	for _, e := range list {
		if e.Prefix.Bits() > bits && e.Prefix.Contains(a) {
			v, bits, ok = e.Verdict, e.Prefix.Bits(), true
		}
	}
	return v, ok
}

// Bindings lists the namespaces that are bound, sorted; "" is all.
func (x *Index) Bindings() []string { return slices.SortedFunc(maps.Keys(x.bound), strings.Compare) }
