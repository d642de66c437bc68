package policy

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/verdict"
)

// packetIndex knows whose packets name addresses of whom, so that a pod that comes, goes or moves touches the packets of those alone.
type packetIndex struct {
	naming    map[spiffeid.ID]map[*Subject]bool // whose packets name an identity
	everyone  map[*Subject]bool                 // whose packets name every pod with a sidecar
	admitting map[*Subject]bool                 // whose egress admits some address, so that a pod need not be named to be reached
	seen      map[string]packetPeer             // pods as the packets of others have them
	// restricting are the pods of seen that have no sidecar and that policy isolates for ingress: every sender enforces that.
	restricting map[string]bool
	serving     map[string][]netip.Addr // services ("namespace/name") with ports of UDP or SCTP, and their addresses outside the service network
	contested   map[netip.Addr]bool     // cluster IPs that two services claim

	ingress map[packetQuestion]*packetSide // since the last change
	sides   interned[digest, packetSide]
	values  interned[sharing, verdict.Packets]

	addressed int // counts addresses that were looked at for packets
}

// packetPeer is what the packets of others rest on.
type packetPeer struct {
	id      spiffeid.ID
	sidecar bool
	addrs   []netip.Addr // those that it owns
	// subject is the key of a restricting pod's subject, whose verdicts count; otherwise empty.
	subject string
}

func newPacketIndex() packetIndex {
	return packetIndex{naming: map[spiffeid.ID]map[*Subject]bool{}, everyone: map[*Subject]bool{}, admitting: map[*Subject]bool{}, seen: map[string]packetPeer{},
		restricting: map[string]bool{}, serving: map[string][]netip.Addr{}, contested: map[netip.Addr]bool{},
		ingress: map[packetQuestion]*packetSide{}}
}

// note enters whom the packets of a subject, whose verdicts are compiled, name.
func (n *packetIndex) note(s *Subject) {
	n.forget(s)
	in, all := packetIdentities(&s.verdicts.Ingress)
	out, more := packetIdentities(&s.verdicts.Egress)
	s.packetNames = append(in, out...)
	for _, id := range s.packetNames {
		if n.naming[id] == nil {
			n.naming[id] = map[*Subject]bool{}
		}
		n.naming[id][s] = true
	}
	if all || more {
		n.everyone[s] = true
	}
	if admitsPackets(&s.verdicts.Egress) {
		n.admitting[s] = true
	}
}

func (n *packetIndex) forget(s *Subject) {
	for _, id := range s.packetNames {
		delete(n.naming[id], s)
		if len(n.naming[id]) == 0 {
			delete(n.naming, id)
		}
	}
	s.packetNames = nil
	delete(n.everyone, s)
	delete(n.admitting, s)
}

// packetPeer is what others' packets rest on of a pod; nil, one that is gone: nothing.
func (x *Index) packetPeer(p *pod) packetPeer {
	if p == nil {
		return packetPeer{}
	}
	out := packetPeer{id: p.ident.id, sidecar: p.sidecar, addrs: x.owned(p)}
	if x.restricts(p) {
		out.subject = p.subject.Key
	}
	return out
}

// restricts reports whether a pod has no sidecar, and policy isolates it for ingress.
func (x *Index) restricts(p *pod) bool {
	return !p.sidecar && slices.ContainsFunc(x.namespace(p.namespace).sortedPolicies(), func(q *netpol) bool { return q.ingress.isolates && q.pods.matches(p.labels) })
}

func (a packetPeer) same(b packetPeer) bool {
	return a.id == b.id && a.sidecar == b.sidecar && a.subject == b.subject && slices.Equal(a.addrs, b.addrs)
}

// touchPackets marks the pods whose packets a change may have changed: those whose verdicts may have, those that are touched themselves, and
// those whose packets name one that is. One more replica touches whoever names its identity.
func (x *Index) touchPackets(c *change) {
	touched, restricts := map[*Subject]bool{}, false
	peers := make([]string, 0, len(c.pods)) // that others' packets may see otherwise now
	for name := range c.pods {
		peers = append(peers, name)
	}
	for key := range c.subjects {
		s := x.subjects[key]
		touched[s] = true
		for name, p := range s.pods {
			if p.sidecar {
				continue
			}
			if !c.pods[name] {
				peers = append(peers, name)
			}
			if x.packets.restricting[name] || x.restricts(p) { // whom it hears may be others now
				restricts = true
				maps.Copy(touched, x.packets.naming[p.ident.id])
			}
		}
	}
	for name := range c.pods {
		if x.pods[name] != nil {
			c.packets[name] = true
		}
	}
	services, all := x.noteServing(c)
	if services || x.nodePortsMoved(c) || len(c.claimed) > 0 || x.endpointsTouched(c) {
		for name := range x.pods {
			c.packets[name] = true
		}
	}
	x.hosts.packetsTouched(x, c)
	for _, name := range peers {
		old, now := x.packets.seen[name], x.packetPeer(x.pods[name])
		if old.same(now) {
			continue
		}
		x.packets.see(name, now)
		restricts = restricts || old.subject != "" || now.subject != ""
		for _, id := range []spiffeid.ID{old.id, now.id} {
			maps.Copy(touched, x.packets.naming[id])
		}
		if old.sidecar || now.sidecar {
			maps.Copy(touched, x.packets.everyone)
		}
	}
	if restricts { // all who may send there hold its ingress policy
		maps.Copy(touched, x.packets.admitting)
	}
	if all {
		for _, s := range x.subjects {
			touched[s] = true
		}
	}
	for s := range touched {
		s.packets = nil
		for name := range s.pods {
			c.packets[name] = true
		}
	}
}

func (n *packetIndex) see(name string, p packetPeer) {
	delete(n.seen, name)
	delete(n.restricting, name)
	if !p.id.IsZero() {
		n.seen[name] = p
	}
	if p.subject != "" {
		n.restricting[name] = true
	}
}

// noteServing enters which services have ports of UDP or SCTP. It reports whether such a service is touched, and whether other cluster IPs than
// before are closed one by one.
func (x *Index) noteServing(c *change) (touched, closed bool) {
	if len(c.services) == 0 {
		return false, false
	}
	n := &x.packets
	for a := range n.contested {
		touched = true
		if len(x.services.claims[a]) < 2 {
			delete(n.contested, a)
		}
	}
	for key := range c.services {
		old, was := n.serving[key]
		delete(n.serving, key)
		var outside []netip.Addr
		v := x.services.byKey[key]
		if v != nil {
			for _, a := range v.addrs {
				if len(x.services.claims[a]) > 1 {
					n.contested[a], touched = true, true
				}
			}
			if slices.ContainsFunc(v.ports, func(p servicePort) bool { return p.protocol != verdict.TCP }) {
				outside = slices.DeleteFunc(slices.Clone(v.addrs), x.inServiceNetwork)
				n.serving[key] = outside
			}
		}
		_, is := n.serving[key]
		touched = touched || was || is
		closed = closed || !slices.Equal(old, outside)
	}
	return touched, closed
}

func (x *Index) inServiceNetwork(a netip.Addr) bool {
	return slices.ContainsFunc(x.serviceNet, func(n netip.Prefix) bool { return n.Contains(a) })
}

// endpointsTouched reports whether a change is about pods that have, or had, the address of an endpoint of a service of UDP or SCTP, or about
// their policy.
func (x *Index) endpointsTouched(c *change) bool {
	if len(x.packets.serving) == 0 {
		return false
	}
	changed := map[netip.Addr]bool{} // addresses of pods that are touched, or were theirs
	for name := range c.pods {
		for _, a := range x.packets.seen[name].addrs {
			changed[a] = true
		}
	}
	for key := range x.packets.serving {
		for _, slice := range x.services.byKey[key].slices {
			for i := range slice.Endpoints {
				for _, text := range slice.Endpoints[i].Addresses {
					a, err := netip.ParseAddr(text)
					if err != nil {
						continue
					}
					o := x.owner(a.Unmap())
					if changed[a.Unmap()] || o != nil && (c.pods[o.key] || c.subjects[o.subject.Key]) {
						return true
					}
				}
			}
		}
	}
	return false
}
