package status

import (
	"maps"
	"slices"
	"strings"
	"time"
)

// Merge makes one of what the replicas say. unheard are those that did not answer, with the reason.
func Merge(reports []Report, unheard map[string]string) Status {
	reports = slices.Clone(reports)
	slices.SortFunc(reports, func(a, b Report) int { return strings.Compare(a.Replica, b.Replica) })
	pods := map[string]present{}
	exempt := map[string]bool{}
	for _, r := range reports {
		for _, n := range r.Namespaces {
			exempt[n.Name] = exempt[n.Name] || n.Exempt
		}
		for _, p := range r.Pods {
			is := present{Pod: p, connected: p.Sidecar != nil && p.Sidecar.Connected}
			if is.connected {
				is.replica = r.Replica
			}
			if was, ok := pods[p.Name]; ok {
				is = counting(was, is)
			}
			pods[p.Name] = is
		}
	}
	s := Status{Replicas: replicas(reports, unheard), Bindings: bindings(reports)}
	for _, name := range slices.Sorted(maps.Keys(pods)) {
		p := pods[name]
		p.state = p.judged(len(unheard))
		if p.state == NoSidecar && exempt[namespaceOf(name)] {
			p.state = Exempt
		}
		pods[name] = p
		if p.Sidecar != nil {
			s.Sidecars = append(s.Sidecars, SidecarStatus{Pod: name, State: p.state, Replica: p.replica, Started: p.Started, Sidecar: *p.Sidecar})
		}
	}
	s.Namespaces = namespaces(reports, pods)
	s.Policies = policies(reports, pods)
	s.State = s.judged()
	return s
}

// present is a pod, with what the replica says of it that its sidecar is connected to.
type present struct {
	Pod
	connected bool
	replica   string // that it is connected to
	state     State
}

// counting is which of two replicas' words on a pod counts: that of the one which its sidecar is connected to, or came to last. The certificate
// is what any of them signed last, and so is whether it is current.
func counting(a, b present) present {
	of := b
	if a.connected && (!b.connected || a.Sidecar.Since.After(b.Sidecar.Since)) {
		of = a
	}
	of.Started = a.Started || b.Started
	if of.Sidecar == nil {
		return of
	}
	merged := *of.Sidecar
	for _, p := range []present{a, b} {
		if p.Sidecar == nil || p.UID != of.UID {
			continue
		}
		if p.Sidecar.Certificate.After(merged.Certificate) {
			merged.Certificate = p.Sidecar.Certificate
		}
		merged.Given, merged.Current = givenLast(merged, *p.Sidecar)
	}
	of.Sidecar = &merged
	return of
}

// clocksDiffer is how far the clocks of two replicas may be apart.
const clocksDiffer = time.Minute

// givenLast is when a sidecar was given its last certificate, and whether that is current. Where two replicas have signed at about the same time, and
// their clocks cannot tell who was last, it is if both say so.
func givenLast(a, b Sidecar) (at time.Time, current bool) {
	if b.Given.After(a.Given) {
		a, b = b, a
	}
	if b.Given.IsZero() || a.Given.Sub(b.Given) > clocksDiffer {
		return a.Given, a.Current
	}
	return a.Given, a.Current && b.Current
}

func (p present) judged(unheard int) State {
	switch {
	case p.Sidecar == nil:
		return NoSidecar
	case !p.connected && unheard > 0:
		return Unknown
	case !p.connected:
		return NotConnected
	case len(p.Sidecar.Refused) > 0:
		return Refused
	case !p.Sidecar.InForce:
		return Waiting
	}
	return InForce
}

func replicas(reports []Report, unheard map[string]string) (list []ReplicaStatus) {
	for _, r := range reports {
		rs := ReplicaStatus{Name: r.Replica, TrustDomain: r.TrustDomain, Policies: len(r.Policies), Roots: r.Roots, Authority: r.Authority, Unbundled: r.Unbundled, Retired: r.Retired.Identities, Problem: r.Retired.Problem}
		for _, p := range r.Pods {
			if p.Sidecar != nil && p.Sidecar.Connected {
				rs.Sidecars++
			}
		}
		list = append(list, rs)
	}
	for name, why := range unheard {
		list = append(list, ReplicaStatus{Name: name, Error: why})
	}
	slices.SortFunc(list, func(a, b ReplicaStatus) int { return strings.Compare(a.Name, b.Name) })
	return list
}

func bindings(reports []Report) (list []Binding) {
	latest := map[string]Binding{}
	for _, r := range reports {
		for _, b := range r.Retired.Bindings {
			if b.Until.After(latest[b.Namespace].Until) {
				latest[b.Namespace] = b
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(latest)) {
		list = append(list, latest[name])
	}
	return list
}

func namespaces(reports []Report, pods map[string]present) (list []NamespaceStatus) {
	byName := map[string]*NamespaceStatus{}
	for _, r := range reports {
		for _, n := range r.Namespaces {
			byName[n.Name] = &NamespaceStatus{Name: n.Name, Mode: n.Mode, Exempt: n.Exempt, Required: n.Required}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(pods)) {
		p := pods[name]
		n := byName[namespaceOf(name)]
		if n == nil {
			continue
		}
		n.Pods++
		switch {
		case p.Sidecar != nil:
			n.Sidecars++
		case n.Required && !n.Exempt:
			n.Missing = append(n.Missing, name)
		}
		if p.state == InForce {
			n.InForce++
		}
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		list = append(list, *byName[name])
	}
	return list
}

// policies holds each policy, in its newest version, against the pods that it selects.
func policies(reports []Report, pods map[string]present) (list []PolicyStatus) {
	newest := map[string]Policy{}
	held := map[string]map[string]Policy{} // by replica and name
	for _, r := range reports {
		held[r.Replica] = map[string]Policy{}
		for _, p := range r.Policies {
			held[r.Replica][p.Name] = p
			if was, ok := newest[p.Name]; !ok || later(p, was) {
				newest[p.Name] = p
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(newest)) {
		p := newest[name]
		ps := PolicyStatus{Name: name, UID: p.UID, Generation: p.Generation, Pods: len(p.Pods), Problems: p.Problems}
		for _, pod := range p.Pods {
			is := pods[pod]
			if has := held[is.replica][name]; is.state == InForce && (has.UID != p.UID || has.Generation != p.Generation) {
				is.state = Waiting // its replica holds another version
			}
			ps.note(is)
		}
		for _, r := range reports {
			if has := held[r.Replica][name]; has.UID != p.UID || has.Generation != p.Generation {
				ps.Behind = append(ps.Behind, r.Replica)
			}
		}
		ps.judge()
		list = append(list, ps)
	}
	return list
}

// later reports whether a is a later version of a policy than b: the object that was created last, and its last generation.
func later(a, b Policy) bool {
	if a.UID != b.UID {
		return a.Created.After(b.Created)
	}
	return a.Generation > b.Generation
}

func (ps *PolicyStatus) note(is present) {
	if is.state == InForce {
		ps.InForce++
		return
	}
	if ps.Elsewhere == nil {
		ps.Elsewhere = map[State][]string{}
	}
	ps.Elsewhere[is.state] = append(ps.Elsewhere[is.state], is.Name)
	if is.state != Refused {
		return
	}
	if ps.Reasons == nil {
		ps.Reasons = map[string][]string{}
	}
	reason := is.Sidecar.Refused[0].Reason
	ps.Reasons[reason] = append(ps.Reasons[reason], is.Name)
}

func (ps *PolicyStatus) judge() {
	switch {
	case ps.InForce == ps.Pods && len(ps.Behind) > 0:
		ps.State = NotEverywhere
	case ps.InForce == ps.Pods:
		ps.State = InForce
	case len(ps.Elsewhere[Refused]) > 0:
		ps.State = Refused
	case len(ps.Elsewhere[Exempt]) == ps.Pods-ps.InForce:
		ps.State = Exempt
	case len(ps.Elsewhere[Unknown]) == ps.Pods-ps.InForce:
		ps.State = Unknown
	default:
		ps.State = NotEverywhere
	}
}

// lastOf is the latest of some times.
func lastOf(list []time.Time) (last time.Time) {
	for _, t := range list {
		if t.After(last) {
			last = t
		}
	}
	return last
}
