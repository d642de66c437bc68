package policy

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/mantlet/mantlet/verdict"
)

// Verdicts returns what is compiled for a subject, compiling it if a change has touched it since. It returns nil for a key that no
// pod has (any more).
func (x *Index) Verdicts(key string) *verdict.Verdicts {
	s := x.subjects[key]
	if s == nil {
		return nil
	}
	x.bring(s)
	return s.verdicts
}

// Hashes are content hashes of the two directions of what is compiled for a subject: all that changes of it while the subject is there.
type Hashes struct{ Ingress, Egress string }

// Hashes returns those of a subject, and none for a key that no pod has (any more). They are made once for each compilation: writing the verdicts
// down to hash them costs more than most else on the way of a change.
func (x *Index) Hashes(key string) Hashes {
	s := x.subjects[key]
	if s == nil {
		return Hashes{}
	}
	x.bring(s)
	if s.hashes == (Hashes{}) {
		s.hashes = Hashes{s.verdicts.Ingress.Hash(), s.verdicts.Egress.Hash()}
	}
	return s.hashes
}

// bring compiles a subject that is dirty.
func (x *Index) bring(s *Subject) {
	if s.verdicts != nil && !x.dirty[s.Key] {
		return
	}
	var u uses
	s.verdicts, s.hashes, s.deciders = x.compile(s, &u), Hashes{}, [2]*verdict.Evaluator{}
	slices.SortFunc(u.selectors, compareSelectors)
	u.selectors = slices.CompactFunc(u.selectors, func(a, b *peerSelector) bool { return a.key == b.key })
	x.read(s, u)
	delete(x.dirty, s.Key)
	x.compiles++
}

// ingress is the evaluator of what is compiled, and egress that of the other direction.
func (s *Subject) ingress() *verdict.Evaluator {
	if s.deciders[0] == nil {
		s.deciders[0] = verdict.NewIngress(s.verdicts)
	}
	return s.deciders[0]
}

func (s *Subject) egress() *verdict.Evaluator {
	if s.deciders[1] == nil {
		s.deciders[1] = verdict.NewEgress(s.verdicts)
	}
	return s.deciders[1]
}

// Compiles counts the compilations so far: the work that changes have caused.
func (x *Index) Compiles() int { return x.compiles }

// Addressed counts the addresses that were looked at so far for packets: the work that comes of judging by address.
func (x *Index) Addressed() int { return x.packets.addressed }

// Subject returns the subject of a pod ("namespace/name"), or nil if there is no such pod.
func (x *Index) Subject(pod string) *Subject {
	p := x.pods[pod]
	if p == nil {
		return nil
	}
	return p.subject
}

// Subjects counts the subjects.
func (x *Index) Subjects() int { return len(x.subjects) }

// SubjectKeys lists all subjects, sorted.
func (x *Index) SubjectKeys() []string {
	m := make(map[string]bool, len(x.subjects))
	for k := range x.subjects {
		m[k] = true
	}
	return sortedKeys(m)
}

// Pod is what the rest of the control plane needs to know of a pod.
type Pod struct {
	Name    string // "namespace/name"
	UID     string
	Subject *Subject
	Addrs   []netip.Addr
	NodeIPs []netip.Addr // of the node that it runs on
	Sidecar bool
}

// Pod returns a pod by "namespace/name".
func (x *Index) Pod(name string) (Pod, bool) {
	p, ok := x.pods[name]
	if !ok {
		return Pod{}, false
	}
	return Pod{Name: p.key, UID: p.uid, Subject: p.subject, Addrs: p.ips, NodeIPs: p.hostIPs, Sidecar: p.sidecar}, true
}

// PodNames lists all pods, "namespace/name", sorted.
func (x *Index) PodNames() []string { return slices.Sorted(maps.Keys(x.pods)) }

// Answer is what becomes of one connection.
type Answer struct {
	Allowed bool
	// Authenticated says that both ends prove who they are (mTLS between two sidecars).
	Authenticated bool
	Reason        verdict.Reason
	// Always says that no policy has a say: the pod itself, or its own node.
	Always bool
}

// Answer decides a connection from a pod ("namespace/name") to an address after service load balancing: what the sidecars of both
// ends, where they have one, make of it.
func (x *Index) Answer(from string, proto verdict.Protocol, to netip.AddrPort) Answer {
	a, _ := x.answer(from, proto, to, (*verdict.Evaluator).Decide)
	return a
}

// admits is Answer without the reason. own says that another pod of the client's subject might get another answer.
func (x *Index) admits(from string, proto verdict.Protocol, to netip.AddrPort) (a Answer, own bool) {
	return x.answer(from, proto, to, func(e *verdict.Evaluator, proto verdict.Protocol, port uint16, peer verdict.Peer) verdict.Decision {
		return verdict.Decision{Allowed: e.Allows(proto, port, peer)}
	})
}

// decider decides for one end: with or without a reason.
type decider func(e *verdict.Evaluator, proto verdict.Protocol, port uint16, peer verdict.Peer) verdict.Decision

func (x *Index) answer(from string, proto verdict.Protocol, to netip.AddrPort, decide decider) (a Answer, own bool) {
	src, ok := x.pods[from]
	if !ok {
		return Answer{Reason: verdict.Reason{Text: "there is no pod " + from}}, true
	}
	addr := to.Addr().Unmap()
	dst := x.owner(addr)
	switch {
	case src == dst:
		return Answer{Allowed: true, Always: true, Reason: verdict.Reason{Text: "a pod always reaches itself"}}, true
	case dst == nil && src.sidecar && x.services.owner(addr) != nil: // as an endpoint it would be balanced once more, past all policy
		return Answer{Reason: verdict.Reason{Text: addr.String() + " is the address of a service, behind which no other one can be"}}, true
	case dst == nil && src.sidecar && x.externalAt(proto, addr, to.Port()) != nil: // so would this, and come from a node, which is admitted everywhere on it
		return Answer{Reason: verdict.Reason{Text: fmt.Sprintf("%s is a service's external address, behind which no other one can be", to)}}, true
	case dst == nil && src.sidecar && x.isNodePort(src, proto, addr, to.Port()): // the same
		return Answer{Reason: verdict.Reason{Text: fmt.Sprintf("%s is a service's node port, behind which no other one can be", to)}}, true
	case dst == nil && src.sidecar && x.isHostPort(src, proto, addr, to.Port()): // the same
		return Answer{Reason: verdict.Reason{Text: fmt.Sprintf("%s is a pod's host port, behind which policy speaks of the pod", to)}}, true
	case !sourceAddr(src, addr).IsValid():
		return Answer{Reason: verdict.Reason{Text: from + " has no address in the family of " + addr.String()}}, false
	case dst == nil && slices.Contains(src.hostIPs, addr):
		return Answer{Allowed: true, Always: true, Reason: verdict.Reason{Text: "a pod always reaches its own node"}}, true
	case dst == nil && src.sidecar && x.inPodNetwork(addr):
		return Answer{Reason: verdict.Reason{Text: "no pod has the address " + addr.String()}}, true
	}
	// What is no pod's may be another's own node, and what is a replica's is another's self.
	own = !src.sidecar || dst == nil || dst.subject == src.subject
	if !src.sidecar && (dst == nil || !dst.sidecar) {
		return Answer{Allowed: true, Reason: verdict.Reason{Text: "not enforced: no end has a sidecar"}}, own
	}
	var reason verdict.Reason
	if src.sidecar {
		x.bring(src.subject)
		peer := verdict.Peer{Addr: addr}
		if dst != nil {
			peer.ID, peer.Name = dst.ident.id, dst.key
		} else {
			peer.Name = addr.String()
		}
		d := decide(src.subject.egress(), proto, to.Port(), peer)
		if !d.Allowed || dst == nil {
			return Answer{Allowed: d.Allowed, Reason: d.Reason}, own
		}
		reason = d.Reason
	}
	x.bring(dst.subject)
	peer := verdict.Peer{Addr: sourceAddr(src, addr), Name: src.key}
	if src.sidecar {
		peer.ID = src.ident.id
	}
	d := decide(dst.subject.ingress(), proto, to.Port(), peer)
	own = own || !dst.subject.ingress().Anywhere(proto, to.Port(), peer.ID)
	if d.Allowed && d.Reason.Policy == "" && reason.Policy != "" {
		d.Reason = reason // ingress is open; what admits is the egress rule
	}
	return Answer{Allowed: d.Allowed, Authenticated: d.Allowed && proto == verdict.TCP && src.sidecar && dst.sidecar, Reason: d.Reason}, own
}

// AnswerOutside decides a connection to a pod from an address that is no pod's.
func (x *Index) AnswerOutside(from netip.Addr, proto verdict.Protocol, to netip.AddrPort) Answer {
	dst := x.owner(to.Addr().Unmap())
	switch {
	case dst == nil:
		return Answer{Reason: verdict.Reason{Text: "no pod has the address " + to.Addr().String()}}
	case !dst.sidecar:
		return Answer{Allowed: true, Reason: verdict.Reason{Text: "not enforced: the pod has no sidecar"}}
	case slices.Contains(dst.hostIPs, from.Unmap()):
		return Answer{Allowed: true, Reason: verdict.Reason{Text: "the pod's own node always reaches it"}}
	}
	x.bring(dst.subject)
	d := dst.subject.ingress().Decide(proto, to.Port(), verdict.Peer{Addr: from})
	return Answer{Allowed: d.Allowed, Reason: d.Reason}
}

func (x *Index) inPodNetwork(a netip.Addr) bool {
	return slices.ContainsFunc(x.podNetwork, func(n netip.Prefix) bool { return n.Contains(a) })
}

// sourceAddr is the address from which a pod talks to an address: the one of the same family.
func sourceAddr(p *pod, to netip.Addr) netip.Addr {
	for _, a := range p.ips {
		if a.Is4() == to.Is4() {
			return a
		}
	}
	return netip.Addr{}
}

// SubjectByKey returns a subject, or nil if no pod has it (any more).
func (x *Index) SubjectByKey(key string) *Subject { return x.subjects[key] }

// ServiceAddrs lists the cluster IPs of a service ("namespace/name").
func (x *Index) ServiceAddrs(name string) []netip.Addr {
	if v, ok := x.services.byKey[name]; ok {
		return v.addrs
	}
	return nil
}
