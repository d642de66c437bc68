package policy

import (
	"cmp"
	"crypto/sha256"
	"iter"
	"maps"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/mantlet/mantlet/verdict"
)

// Endpoint is a place where a connection may end up.
type Endpoint struct {
	Addr    netip.AddrPort
	Pod     string      // "namespace/name"; empty: no pod, for example an address outside
	ID      spiffeid.ID // the pod's identity; zero without a pod
	Sidecar bool
	// Always says that no policy has a say between the client and here (Answer.Always). Only Admitted, which knows the client, sets it.
	Always bool
}

// Destination is what an address and port inside the cluster stand for.
type Destination struct {
	Service  string // "namespace/name"; empty: the address of a pod
	Protocol verdict.Protocol
	// Endpoints are those that the node's service proxy would choose from, whatever policies say; sorted by address.
	Endpoints []Endpoint
	// Others are the service's remaining ones: not ready, or meant for clients on other nodes or in other zones.
	Others []Endpoint
	// Local says that the service has endpoints for one node only: that of the client (internalTrafficPolicy: Local), or that of the node port
	// (externalTrafficPolicy: Local).
	Local bool
	// Outside says that the address is no pod's, no service's and not that of the client's node: Endpoints has it as it is, and ipBlocks judge it.
	Outside bool
	// Sources are the ranges from which alone clients may come, if not empty: spec.loadBalancerSourceRanges, at an address of the load balancer. See Admitted.
	Sources []netip.Prefix
	// Sticky says that all connections of a client go to one and the same endpoint (sessionAffinity: ClientIP); see Admitted.
	Sticky bool

	own bool // where the client is has a part in it, or could have had
}

// Destination looks up a service's cluster IP and port, a pod's address with any port, or a service's external address and port, for nobody in
// particular: nodes and zones make no difference. It returns false for an address that is none of these, and for a port that the service does not have.
func (x *Index) Destination(proto verdict.Protocol, to netip.AddrPort) (Destination, bool) {
	return x.destination(proto, to, anywhereInCluster)
}

// DestinationFor is the same for a client pod ("namespace/name"), with the node and the zone that it is in. To it an address of a node, its own
// or another, is a destination too: at a node port the service, at a host port of its own the pod, else the node. So is every address outside the cluster,
// which stands for itself.
func (x *Index) DestinationFor(client string, proto verdict.Protocol, to netip.AddrPort) (Destination, bool) {
	p := x.pods[client]
	if p == nil {
		return x.destination(proto, to, place{})
	}
	at := place{node: p.node, zone: x.zones[p.node]}
	d, ok := x.destination(proto, to, at)
	if ok {
		return d, true
	}
	addr := to.Addr().Unmap()
	if node, ok := x.nodeAt(addr, p); ok {
		if d, ok := x.atNodePort(proto, to, node, at); ok {
			d.own = true // to a pod of another node it may be another one
			return d, true
		}
	}
	if x.isHostPort(p, proto, addr, to.Port()) {
		return x.atHostPort(proto, to, p.node), true
	}
	own := slices.Contains(p.hostIPs, addr)
	if !own && x.inside(addr) {
		return Destination{own: true}, false
	}
	return Destination{Protocol: proto, Outside: !own, Endpoints: []Endpoint{{Addr: netip.AddrPortFrom(addr, to.Port())}}, own: true}, true
}

// DestinationForAny holds all that DestinationFor may say to anybody: on what those answers rest.
func (x *Index) DestinationForAny(proto verdict.Protocol, to netip.AddrPort) Destination {
	d, ok := x.Destination(proto, to)
	if !ok {
		d, ok = x.atNodePort(proto, to, "", anywhereInCluster)
	}
	if !ok {
		d = x.atAnyHostPort(proto, to)
	}
	return d
}

// inside reports whether an address is of the ranges from which pods and services get theirs, or a service's.
func (x *Index) inside(a netip.Addr) bool {
	return x.inPodNetwork(a) || x.inServiceNetwork(a) || x.services.owner(a) != nil
}

func (x *Index) destination(proto verdict.Protocol, to netip.AddrPort, from place) (Destination, bool) {
	addr := to.Addr().Unmap()
	if v := x.services.owner(addr); v != nil {
		for _, p := range v.ports {
			if p.number == to.Port() && p.protocol == proto {
				return x.behind(v, p, addr.Is4(), from), true
			}
		}
		return Destination{}, false
	}
	if x.owner(addr) != nil {
		return Destination{Protocol: proto, Endpoints: []Endpoint{x.endpoint(netip.AddrPortFrom(addr, to.Port()))}}, true
	}
	if c := x.externalAt(proto, addr, to.Port()); c != nil {
		return x.behindExternal(c, proto, to, from)
	}
	return Destination{}, false
}

// Admitted are those of a destination's endpoints that a client pod may be sent to: the policies of both ends admit it there (see
// Answer). Of a sticky destination it is one, always the same one as long as that is admitted: an endpoint more or less moves
// a client only to the new one, or away from the one that went. Unlike a service proxy's, which forgets a client after
// spec.sessionAffinityConfig.clientIP.timeoutSeconds without a connection, this choice has nothing to forget and never times out.
func (x *Index) Admitted(client string, d Destination) []Endpoint {
	out, _ := x.admitted(client, d)
	return out
}

// admitted is Admitted. own says that something of the client alone has a part in it, beside its subject.
func (x *Index) admitted(client string, d Destination) (out []Endpoint, own bool) {
	out = make([]Endpoint, 0, len(d.Endpoints))
	if len(d.Sources) > 0 {
		if own = true; !x.ComesFrom(client, d) {
			return out, own
		}
	}
	for _, e := range d.Endpoints {
		a, alone := x.admits(client, d.Protocol, e.Addr)
		own = own || alone
		if a.Allowed {
			e.Always = a.Always
			out = append(out, e)
		}
	}
	if p := x.pods[client]; d.Sticky && len(out) > 1 {
		return []Endpoint{stick(sourceAddr(p, out[0].Addr.Addr()), out)}, true
	}
	return out, own
}

// ComesFrom reports whether a client pod ("namespace/name") has an address in the ranges from which clients may come to a destination (Destination.Sources).
func (x *Index) ComesFrom(client string, d Destination) bool {
	p := x.pods[client]
	return len(d.Sources) == 0 || p != nil && slices.ContainsFunc(d.Sources, func(n netip.Prefix) bool { return slices.ContainsFunc(p.ips, n.Contains) })
}

// stick chooses by rendezvous hashing: the endpoint of which the hash with the client's address is the greatest. The port is
// not hashed: on all ports of a service a client meets the same pod.
func stick(client netip.Addr, endpoints []Endpoint) Endpoint {
	weigh := func(e Endpoint) [sha256.Size]byte {
		a, b := client.As16(), e.Addr.Addr().As16()
		return sha256.Sum256(append(a[:], b[:]...))
	}
	best, most := endpoints[0], weigh(endpoints[0])
	for _, e := range endpoints[1:] {
		if w := weigh(e); slices.Compare(w[:], most[:]) > 0 {
			best, most = e, w
		}
	}
	return best
}

// ServicePort is one port of a service as one pod may use it.
type ServicePort struct {
	Addr      netip.AddrPort   // cluster IP or external address and port, or an address of a node and a node port or a host port
	Endpoints []netip.AddrPort // where to send it, any of them; sorted. Empty: nowhere
	External  bool             // Addr is no cluster IP, so that nothing closes it beside this
}

// ServicePorts lists what a client pod ("namespace/name") may use of the services' ports of a protocol, sorted by address: for
// protocols that no sidecar balances. It rests on all services, all pods and the policies of both ends.
func (x *Index) ServicePorts(client string, proto verdict.Protocol) []ServicePort {
	var out []ServicePort
	add := func(sp ServicePort) {
		for _, e := range x.Reach(client, proto, sp.Addr).Endpoints {
			sp.Endpoints = append(sp.Endpoints, e.Addr)
		}
		out = append(out, sp)
	}
	for v := range x.servicesOf(proto) {
		for i, addr := range v.addrs {
			if x.services.owner(addr) != v || slices.Index(v.addrs, addr) < i {
				continue
			}
			for _, p := range v.ports {
				if p.protocol == proto {
					add(ServicePort{Addr: netip.AddrPortFrom(addr, p.number)})
				}
			}
		}
		for _, e := range v.external {
			for _, p := range v.ports {
				if c := x.externalAt(proto, e.addr, p.number); p.protocol == proto && c != nil && c.service == v {
					add(ServicePort{Addr: netip.AddrPortFrom(e.addr, p.number), External: true})
				}
			}
		}
	}
	if p := x.pods[client]; p != nil {
		out = append(out, x.nodePortsFor(p, proto)...)
		out = append(out, x.hostPortsFor(p, proto)...)
	}
	slices.SortFunc(out, func(a, b ServicePort) int { return a.Addr.Compare(b.Addr) })
	return out
}

// servicesOf ranges over all services that have ports of a protocol, and maybe others.
func (x *Index) servicesOf(proto verdict.Protocol) iter.Seq[*service] {
	if proto == verdict.TCP {
		return maps.Values(x.services.byKey)
	}
	return func(yield func(*service) bool) { // nearly none has any of these
		for key := range x.packets.serving {
			if !yield(x.services.byKey[key]) {
				return
			}
		}
	}
}

// place is where a client is. What is empty is not known, and is the same as nothing.
type place struct{ node, zone string }

// anywhereInCluster is a client to which neither nodes nor zones make a difference.
var anywhereInCluster = place{node: "*", zone: "*"}

// candidate is an endpoint with what decides whether it is used (discovery/v1 Endpoint, k8s.io/api v0.37).
type candidate struct {
	Endpoint
	ready bool
	// leaving: it terminates and still serves.
	leaving            bool
	node               string
	forNodes, forZones []string
}

// behind chooses among the endpoints of a service port in one family as kube-proxy does:
//
//   - internalTrafficPolicy Local (core/v1 ServiceSpec): only those on the client's node;
//   - else those that hints.forNodes means for the client's node, if every ready one has such a hint and one is for that node;
//   - else the same with hints.forZones and the client's zone. Hints come from spec.trafficDistribution; that field itself is for whoever makes the slices;
//   - of these the ready ones. publishNotReadyAddresses is in ready already (EndpointConditions.ready);
//   - if there is none, those that terminate and still serve (KEP-1672).
func (x *Index) behind(v *service, p servicePort, v4 bool, from place) Destination {
	all := x.endpointsOf(v, p, v4)
	near := func(candidate) bool { return true }
	switch {
	case from == anywhereInCluster:
	case v.local:
		near = func(c candidate) bool { return from.node != "" && c.node == from.node }
	case hinted(all, from.node, func(c candidate) []string { return c.forNodes }):
		near = func(c candidate) bool { return slices.Contains(c.forNodes, from.node) }
	case hinted(all, from.zone, func(c candidate) []string { return c.forZones }):
		near = func(c candidate) bool { return slices.Contains(c.forZones, from.zone) }
	}
	usable := func(c candidate) bool { return c.ready && near(c) }
	if !slices.ContainsFunc(all, usable) {
		usable = func(c candidate) bool { return c.leaving && near(c) }
	}
	d := Destination{Service: v.key, Protocol: p.protocol, Local: v.local, Sticky: v.sticky, Endpoints: make([]Endpoint, 0, len(all)), own: v.local}
	for _, c := range all {
		d.own = d.own || len(c.forNodes)+len(c.forZones) > 0
		if usable(c) {
			d.Endpoints = append(d.Endpoints, c.Endpoint)
		} else {
			d.Others = append(d.Others, c.Endpoint)
		}
	}
	return d
}

// hinted reports whether hints of one kind count: every ready endpoint has one, and one is for the client's own node or zone.
func hinted(all []candidate, own string, hints func(candidate) []string) bool {
	one := false
	for _, c := range all {
		if !c.ready {
			continue
		}
		if len(hints(c)) == 0 {
			return false
		}
		one = one || own != "" && slices.Contains(hints(c), own)
	}
	return one
}

// endpointsOf collects the endpoints of a service port in one family, sorted by address. Where one is in two slices, the one that is
// ready counts, then the one that is leaving, then the slice that is first by name.
func (x *Index) endpointsOf(v *service, p servicePort, v4 bool) []candidate {
	family := discoveryv1.AddressTypeIPv6
	if v4 {
		family = discoveryv1.AddressTypeIPv4
	}
	var out []candidate
	for _, name := range slices.Sorted(maps.Keys(v.slices)) {
		s := v.slices[name]
		if s.AddressType != family {
			continue
		}
		for i := range s.Ports {
			sp := &s.Ports[i]
			if sp.Port == nil || *sp.Port < 1 || *sp.Port > 65535 || deref(sp.Name) != p.name {
				continue
			}
			if proto, err := verdict.ParseProtocol(string(deref(sp.Protocol))); err != nil || proto != p.protocol {
				continue
			}
			out = slices.Grow(out, len(s.Endpoints))
			for j := range s.Endpoints {
				if c, ok := x.candidate(&s.Endpoints[j], uint16(*sp.Port)); ok && c.Addr.Addr().Is4() == v4 {
					out = append(out, c)
				}
			}
		}
	}
	rank := func(c candidate) int {
		switch {
		case c.ready:
			return 0
		case c.leaving:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(out, func(a, b candidate) int { return cmp.Or(a.Addr.Compare(b.Addr), rank(a)-rank(b)) })
	return slices.CompactFunc(out, func(a, b candidate) bool { return a.Addr == b.Addr })
}

// candidate reads one endpoint of a slice: its first address (no meaning is defined for others, Endpoint.addresses), and conditions
// of which an absent ready and an absent serving mean true, an absent terminating false (EndpointConditions). Addresses that a host
// has only to itself or its link the API server refuses; connecting there a sidecar would meet its own loopback, or the node's.
func (x *Index) candidate(e *discoveryv1.Endpoint, port uint16) (candidate, bool) {
	if len(e.Addresses) == 0 {
		return candidate{}, false
	}
	addr, err := netip.ParseAddr(e.Addresses[0])
	if err != nil || !addr.Unmap().IsGlobalUnicast() || addr.Zone() != "" {
		return candidate{}, false
	}
	c := candidate{Endpoint: x.endpoint(netip.AddrPortFrom(addr.Unmap(), port)), node: deref(e.NodeName)}
	c.ready = e.Conditions.Ready == nil || *e.Conditions.Ready
	serving := e.Conditions.Serving == nil || *e.Conditions.Serving
	c.leaving = serving && deref(e.Conditions.Terminating)
	if e.Hints != nil {
		for _, h := range e.Hints.ForNodes {
			c.forNodes = append(c.forNodes, h.Name)
		}
		for _, h := range e.Hints.ForZones {
			c.forZones = append(c.forZones, h.Name)
		}
	}
	return c, true
}

func (x *Index) endpoint(a netip.AddrPort) Endpoint {
	e := Endpoint{Addr: a}
	if p := x.owner(a.Addr()); p != nil {
		e.Pod, e.ID, e.Sidecar = p.key, p.ident.id, p.sidecar
	}
	return e
}
