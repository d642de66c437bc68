package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/verdict"
)

// externals are the addresses at which Services are to be had beside their cluster IPs: spec.externalIPs, and the addresses of
// status.loadBalancer.ingress. A node sends on what its pods send there as what they send to a cluster IP, and with its own address: past the ingress
// policy of pods on that node. So they are destinations too, as cluster IPs and node ports are.
//
// An address is a Service's at the Service's ports only; at all others it is what it was, outside or a node. Who may write a Service may name any address
// (CVE-2020-8554), so an address of a pod, and a cluster IP, stay what they are, whoever else names them.
type externals struct {
	claims map[netip.Addr]map[portKey][]claim
	tcp    []netip.AddrPort // all that are claimed over TCP, sorted; nil: nobody has asked since they changed
}

// claim is a Service's to a port of an address.
type claim struct {
	service  *service
	assigned bool           // by the load balancer, in status; else by whoever wrote spec.externalIPs
	sources  []netip.Prefix // of clients, if not empty: spec.loadBalancerSourceRanges
}

// externalAddr is one address of a Service.
type externalAddr struct {
	addr netip.Addr
	claim
}

// externalAddrs reads the addresses of a Service as kube-proxy does: those of the families in which the Service has a cluster IP, so that headless
// Services have none. Those of a load balancer with ipMode Proxy (core/v1 LoadBalancerIngress) are left out: nodes let through what goes there, to the
// load balancer, which sends it on to a node or a pod with its own address.
func externalAddrs(o *corev1.Service, v *service) (out []externalAddr) {
	add := func(text string, c claim) {
		a, err := netip.ParseAddr(text)
		a = a.Unmap()
		switch {
		case err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast():
			return
		case !slices.ContainsFunc(v.addrs, func(own netip.Addr) bool { return own.Is4() == a.Is4() }):
			return
		}
		c.service = v
		c.sources = slices.DeleteFunc(slices.Clone(c.sources), func(p netip.Prefix) bool { return p.Addr().Is4() != a.Is4() })
		if i := slices.IndexFunc(out, func(e externalAddr) bool { return e.addr == a }); i >= 0 {
			return // named twice
		}
		out = append(out, externalAddr{a, c})
	}
	var sources []netip.Prefix
	for _, text := range o.Spec.LoadBalancerSourceRanges {
		if p, err := netip.ParsePrefix(strings.TrimSpace(text)); err == nil {
			sources = append(sources, p.Masked())
		}
	}
	for _, in := range o.Status.LoadBalancer.Ingress {
		if deref(in.IPMode) == corev1.LoadBalancerIPModeProxy {
			continue
		}
		add(in.IP, claim{assigned: true, sources: sources})
	}
	for _, ip := range o.Spec.ExternalIPs {
		add(ip, claim{})
	}
	return out
}

// claimExternal enters the external addresses of a service, whose ports are known.
func (s *services) claimExternal(v *service, c *change) {
	for _, e := range v.external {
		c.addrs[e.addr] = true
		for _, p := range v.ports {
			at := portKey{p.protocol, p.number}
			ports := s.external.claims[e.addr]
			if ports == nil {
				ports = map[portKey][]claim{}
				s.external.claims[e.addr] = ports
			}
			if slices.ContainsFunc(ports[at], func(is claim) bool { return is.service == v }) {
				continue // two of its ports with one number: the API server refuses that
			}
			if len(ports[at]) == 0 {
				s.external.moved(e.addr, at, c)
			}
			ports[at] = append(ports[at], e.claim)
		}
	}
}

func (s *services) disclaimExternal(v *service, c *change) {
	for _, e := range v.external {
		c.addrs[e.addr] = true
		ports := s.external.claims[e.addr]
		for _, p := range v.ports {
			at := portKey{p.protocol, p.number}
			rest := slices.DeleteFunc(slices.Clone(ports[at]), func(is claim) bool { return is.service == v })
			if len(rest) > 0 {
				ports[at] = rest
				continue
			}
			if len(ports[at]) > 0 {
				s.external.moved(e.addr, at, c)
			}
			delete(ports, at)
		}
		if len(ports) == 0 {
			delete(s.external.claims, e.addr)
		}
	}
}

// moved notes that a port of an address came to be a service's, or ceased to. Both in one change are nothing.
func (x *externals) moved(a netip.Addr, at portKey, c *change) {
	if at.protocol != verdict.TCP {
		return
	}
	x.tcp = nil
	to := netip.AddrPortFrom(a, at.number)
	if c.external[to] {
		delete(c.external, to)
	} else {
		c.external[to] = true
	}
}

// prior is the claim that counts: what a load balancer was given goes before what somebody wrote into a spec, then the Service that was created first,
// then by name. So no Service that comes later takes an address from one that has it.
func prior(claims []claim) *claim {
	if len(claims) == 0 {
		return nil
	}
	order := func(c claim) int {
		if c.assigned {
			return 0
		}
		return 1
	}
	c := slices.MinFunc(claims, func(a, b claim) int {
		return cmp.Or(order(a)-order(b), a.service.since.Compare(b.service.since), strings.Compare(a.service.key, b.service.key))
	})
	return &c
}

// externalAt is the claim to a port of an address that is no pod's and no cluster IP; nil: nobody's.
func (x *Index) externalAt(proto verdict.Protocol, a netip.Addr, port uint16) *claim {
	c := prior(x.services.external.claims[a][portKey{proto, port}])
	if c == nil || len(x.claims[a]) > 0 || x.services.owner(a) != nil {
		return nil
	}
	return c
}

// behindExternal is what an external address stands for. Neither traffic policy has a say: "traffic sent to an External IP or LoadBalancer IP from within
// the cluster will always get Cluster semantics" (core/v1 ServiceSpec.externalTrafficPolicy), and internalTrafficPolicy is about the cluster IP.
func (x *Index) behindExternal(c *claim, proto verdict.Protocol, to netip.AddrPort, from place) (Destination, bool) {
	v := *c.service
	v.local = false
	for _, p := range v.ports {
		if p.number == to.Port() && p.protocol == proto {
			d := x.behind(&v, p, to.Addr().Unmap().Is4(), from)
			d.Sources = c.sources
			return d, true
		}
	}
	return Destination{}, false
}

// External lists the external addresses of services, with their TCP ports: what sidecars have to ask about, beside the pod and service networks, and also
// inside them, where an address may be the node's. Sorted; it is shared, and must not be changed.
func (x *Index) External() []netip.AddrPort {
	e := &x.services.external
	if e.tcp == nil {
		e.tcp = []netip.AddrPort{}
		for a, ports := range e.claims {
			for at := range ports {
				if at.protocol == verdict.TCP {
					e.tcp = append(e.tcp, netip.AddrPortFrom(a, at.number))
				}
			}
		}
		slices.SortFunc(e.tcp, netip.AddrPort.Compare)
	}
	return e.tcp
}

// ServiceExternalAddrs lists the external addresses of a service ("namespace/name"), whoever has them.
func (x *Index) ServiceExternalAddrs(name string) (out []netip.Addr) {
	if v, ok := x.services.byKey[name]; ok {
		for _, e := range v.external {
			out = append(out, e.addr)
		}
	}
	return out
}

// ExternalAddrs lists the external addresses of services, sorted.
func (x *Index) ExternalAddrs() []netip.Addr {
	out := make([]netip.Addr, 0, len(x.services.external.claims))
	for a := range x.services.external.claims {
		out = append(out, a)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// Contest is a port of an external address to which not everybody gets what he claims.
type Contest struct {
	Protocol verdict.Protocol
	Addr     netip.AddrPort
	// Holder is what the address is: "service shop/api", "pod shop/db-0", "cluster IP of service shop/api".
	Holder string
	// Others are the services ("namespace/name") that claim it in vain, sorted.
	Others []string
}

// Contests lists those of an address, sorted by protocol and port.
func (x *Index) Contests(a netip.Addr) (out []Contest) {
	for at, claims := range x.services.external.claims[a] {
		c := Contest{Protocol: at.protocol, Addr: netip.AddrPortFrom(a, at.number)}
		holder := prior(claims).service
		switch v := x.services.owner(a); {
		case v != nil:
			c.Holder, holder = "cluster IP of service "+v.key, nil
		case len(x.claims[a]) > 0:
			c.Holder, holder = "pod "+x.claims[a][0].key, nil
		default:
			c.Holder = "service " + holder.key
		}
		for _, other := range claims {
			if other.service != holder {
				c.Others = append(c.Others, other.service.key)
			}
		}
		if len(c.Others) > 0 {
			slices.Sort(c.Others)
			out = append(out, c)
		}
	}
	slices.SortFunc(out, func(p, q Contest) int { return cmp.Or(cmp.Compare(p.Protocol, q.Protocol), p.Addr.Compare(q.Addr)) })
	return out
}
