package policy

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/verdict"
)

// retired are identities that pods had while they ran and no longer have, by the addresses of those pods, each with the time at which the
// last certificate for it has ended. From there nobody is admitted by that identity, unless a pod that has it owns the address (again).
//
// It concerns isolated destinations. At one that nobody isolates anyone is admitted, under whatever name.
type retired map[spiffeid.ID]map[netip.Addr]time.Time

// Retire refuses an identity from an address until a time (see Expire): the pod there has another one now.
func (x *Index) Retire(id spiffeid.ID, addr netip.Addr, until time.Time) Delta {
	addr = addr.Unmap()
	c := newChange()
	at := x.retired[id]
	if at == nil {
		at = map[netip.Addr]time.Time{}
		x.retired[id] = at
	}
	if old, known := at[addr]; !known {
		at[addr] = until
		x.touchRetired(id, c)
	} else if until.After(old) {
		at[addr] = until
	}
	return x.finish(c)
}

// Expire forgets what was retired, or bound, until now, or earlier.
func (x *Index) Expire(now time.Time) Delta {
	c := newChange()
	x.unbind(now, c)
	for id, at := range x.retired {
		for addr, until := range at {
			if until.After(now) {
				continue
			}
			delete(at, addr)
			x.touchRetired(id, c)
		}
		if len(at) == 0 {
			delete(x.retired, id)
		}
	}
	return x.finish(c)
}

// Inherit takes over what another Index has retired and bound. It is for an Index that takes its place, before anything was asked of it.
func (x *Index) Inherit(from *Index) {
	for id, at := range from.retired {
		x.retired[id] = maps.Clone(at)
	}
	x.bound = maps.Clone(from.bound)
	for key := range x.subjects {
		x.dirty[key] = true
	}
}

// NextExpiry is when there is something to Expire; false: nothing is retired or bound.
func (x *Index) NextExpiry() (next time.Time, ok bool) {
	sooner := func(until time.Time) {
		if !ok || until.Before(next) {
			next, ok = until, true
		}
	}
	for _, at := range x.retired {
		for _, until := range at {
			sooner(until)
		}
	}
	for _, until := range x.bound {
		sooner(until)
	}
	return next, ok
}

// Retired reports until when an identity is refused from an address; false: it is not retired there.
func (x *Index) Retired(id spiffeid.ID, addr netip.Addr) (until time.Time, ok bool) {
	until, ok = x.retired[id][addr.Unmap()]
	return until, ok
}

// touchRetired marks the subjects that might admit an identity: those that list it, and those that admit by address.
func (x *Index) touchRetired(id spiffeid.ID, c *change) {
	mark(c, x.readers.byAddress)
	mark(c, x.readers.egress[id])
}

// touchRetiredAt does so for what is retired at addresses whose owner may be another one now.
func (x *Index) touchRetiredAt(addrs []netip.Addr, c *change) {
	for id, at := range x.retired {
		if slices.ContainsFunc(addrs, func(a netip.Addr) bool { _, ok := at[a]; return ok }) {
			x.touchRetired(id, c)
		}
	}
}

// retiredPeer is an identity, and from where it is refused.
type retiredPeer struct {
	id    spiffeid.ID
	addrs []netip.Addr // sorted
}

// retiredPeers lists what is in force, sorted by identity.
func (x *Index) retiredPeers() []retiredPeer {
	var out []retiredPeer
	for id, at := range x.retired {
		addrs := slices.DeleteFunc(slices.SortedFunc(maps.Keys(at), netip.Addr.Compare), func(a netip.Addr) bool {
			o := x.owner(a)
			return o != nil && o.ident.id == id
		})
		if len(addrs) > 0 {
			out = append(out, retiredPeer{id, addrs})
		}
	}
	slices.SortFunc(out, func(a, b retiredPeer) int { return compareIDs(a.id, b.id) })
	return out
}

var reasonRetired = verdict.Reason{Text: "identity retired: the pod at this address has other labels now, and another identity; its certificate for this one is refused from here until it ends"}

// retire refuses a retired identity from its addresses, where it would be admitted.
func (p *peers) retire(r retiredPeer, intern func(verdict.Reason) int) {
	i, listed := slices.BinarySearchFunc(p.ByIdentity, r.id, func(e verdict.Identity, id spiffeid.ID) int { return compareIDs(e.ID, id) })
	entry := verdict.Identity{ID: r.id, Addresses: slices.Clone(p.Identified)} // as it is judged where it is not listed
	if listed {
		entry = p.ByIdentity[i]
		entry.Addresses = slices.Clone(entry.Addresses)
		if len(entry.Addresses) == 0 {
			for _, all := range everywhere {
				entry.Addresses = append(entry.Addresses, verdict.Prefix{Prefix: all, Verdict: entry.Verdict})
			}
		}
	}
	before := slices.Clone(entry.Addresses)
	refused := false
	for _, a := range r.addrs {
		if !admitted(before, a) {
			continue
		}
		refused = true
		entry.Addresses = slices.DeleteFunc(entry.Addresses, func(e verdict.Prefix) bool { return e.Prefix == host(a) })
		entry.Addresses = append(entry.Addresses, verdict.Prefix{Prefix: host(a), Verdict: verdict.Verdict{Reason: intern(reasonRetired)}})
	}
	if !refused {
		return
	}
	sortPrefixes(entry.Addresses)
	switch {
	case !listed:
		entry.Verdict = verdict.Verdict{Reason: intern(verdict.Unlisted)}
		p.ByIdentity = slices.Insert(p.ByIdentity, i, entry)
	case entry.Verdict.Allow: // now that addresses decide, they hold everybody
		entry.Verdict = verdict.Verdict{Reason: intern(reasonRetired)}
		fallthrough
	default:
		p.ByIdentity[i] = entry
	}
}

// admitted reports whether prefixes admit an address.
func admitted(list []verdict.Prefix, a netip.Addr) bool {
	v, _ := longest(list, a)
	return v.Allow
}
