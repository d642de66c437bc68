package policy

import (
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/verdict"
)

// services holds Services and their EndpointSlices.
type services struct {
	byKey  map[string]*service // by "namespace/name"
	claims map[netip.Addr][]*service
	slices map[string]*service // by "namespace/name" of an EndpointSlice: the service that it belongs to
}

type service struct {
	key    string
	since  time.Time    // creation of the Service object
	addrs  []netip.Addr // cluster IPs; none for headless and ExternalName services
	ports  []servicePort
	slices map[string]*discoveryv1.EndpointSlice
}

type servicePort struct {
	name     string
	protocol verdict.Protocol
	number   uint16
}

func newServices() services {
	return services{byKey: map[string]*service{}, claims: map[netip.Addr][]*service{}, slices: map[string]*service{}}
}

func (s *services) get(key string) *service {
	v, ok := s.byKey[key]
	if !ok {
		v = &service{key: key, slices: map[string]*discoveryv1.EndpointSlice{}}
		s.byKey[key] = v
	}
	return v
}

func (s *services) set(o *corev1.Service, c *change) {
	v := s.get(o.Namespace + "/" + o.Name)
	s.unmap(v)
	v.since, v.addrs, v.ports = o.CreationTimestamp.Time, nil, nil
	ips := o.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{o.Spec.ClusterIP}
	}
	if o.Spec.Type != corev1.ServiceTypeExternalName {
		for _, ip := range ips {
			if a, err := netip.ParseAddr(ip); err == nil { // "None" and "" are no addresses
				v.addrs = append(v.addrs, a.Unmap())
				s.claims[a.Unmap()] = append(s.claims[a.Unmap()], v)
			}
		}
	}
	for _, p := range o.Spec.Ports {
		proto, err := verdict.ParseProtocol(string(p.Protocol))
		if err != nil || p.Port < 1 || p.Port > 65535 {
			continue
		}
		v.ports = append(v.ports, servicePort{p.Name, proto, uint16(p.Port)})
	}
	c.services[v.key] = true
}

func (s *services) unmap(v *service) {
	for _, a := range v.addrs {
		s.claims[a] = slices.DeleteFunc(slices.Clone(s.claims[a]), func(o *service) bool { return o == v })
		if len(s.claims[a]) == 0 {
			delete(s.claims, a)
		}
	}
}

// owner is the service that an address belongs to, or nil. Two claim it for a while where events of one come before those of the
// other; then it belongs to the newer one (by creation, then by name).
func (s *services) owner(a netip.Addr) *service {
	var out *service
	for _, v := range s.claims[a] {
		if out == nil || v.since.After(out.since) || v.since.Equal(out.since) && v.key < out.key {
			out = v
		}
	}
	return out
}

func (s *services) remove(o *corev1.Service, c *change) {
	key := o.Namespace + "/" + o.Name
	v, ok := s.byKey[key]
	if !ok {
		return
	}
	s.unmap(v)
	v.addrs, v.ports = nil, nil
	s.drop(v)
	c.services[key] = true
}

func (s *services) drop(v *service) {
	if len(v.slices) == 0 && len(v.ports) == 0 && len(v.addrs) == 0 {
		delete(s.byKey, v.key)
	}
}

func (s *services) setSlice(o *discoveryv1.EndpointSlice, c *change) {
	key := o.Namespace + "/" + o.Name
	name := o.Labels[discoveryv1.LabelServiceName]
	if v := s.slices[key]; v != nil && v.key != o.Namespace+"/"+name { // it may go from one service to another
		s.removeSlice(o, c)
	}
	if name == "" {
		return
	}
	v := s.get(o.Namespace + "/" + name)
	v.slices[o.Name] = o
	s.slices[key] = v
	c.services[v.key] = true
}

// removeSlice goes by the slice's name: in what a watch says of a deleted object the label may be gone.
func (s *services) removeSlice(o *discoveryv1.EndpointSlice, c *change) {
	v := s.slices[o.Namespace+"/"+o.Name]
	if v == nil {
		return
	}
	delete(s.slices, o.Namespace+"/"+o.Name)
	delete(v.slices, o.Name)
	c.services[v.key] = true
	s.drop(v)
}

// Endpoint is a place where a connection may end up.
type Endpoint struct {
	Addr    netip.AddrPort
	Pod     string      // "namespace/name"; empty: no pod, for example an address outside
	ID      spiffeid.ID // the pod's identity; zero without a pod
	Sidecar bool
}

// Destination is what an address and port inside the cluster stand for.
type Destination struct {
	Service   string // "namespace/name"; empty: the address of a pod
	Protocol  verdict.Protocol
	Endpoints []Endpoint // sorted by address
}

// Destination looks up a service's cluster IP and port, or a pod's address with any port. It returns false for an address that is
// neither, and for a port that the service does not have.
func (x *Index) Destination(proto verdict.Protocol, to netip.AddrPort) (Destination, bool) {
	addr := to.Addr().Unmap()
	if v := x.services.owner(addr); v != nil {
		for _, p := range v.ports {
			if p.number == to.Port() && p.protocol == proto {
				return Destination{Service: v.key, Protocol: proto, Endpoints: x.endpoints(v, p, addr.Is4())}, true
			}
		}
		return Destination{}, false
	}
	if x.owner(addr) != nil {
		return Destination{Protocol: proto, Endpoints: []Endpoint{x.endpoint(netip.AddrPortFrom(addr, to.Port()))}}, true
	}
	return Destination{}, false
}

// endpoints collects the ready endpoints of a service port in one family. Slices say ready for services that publish addresses
// which are not (EndpointConditions.ready).
func (x *Index) endpoints(v *service, p servicePort, v4 bool) []Endpoint {
	var out []Endpoint
	for _, s := range v.slices {
		if (s.AddressType == discoveryv1.AddressTypeIPv4) != v4 || s.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		for _, sp := range s.Ports {
			if sp.Port == nil || *sp.Port < 1 || *sp.Port > 65535 || deref(sp.Name) != p.name {
				continue
			}
			if proto, err := verdict.ParseProtocol(string(deref(sp.Protocol))); err != nil || proto != p.protocol {
				continue
			}
			for _, e := range s.Endpoints {
				if e.Conditions.Ready != nil && !*e.Conditions.Ready {
					continue
				}
				for _, a := range e.Addresses {
					if addr, err := netip.ParseAddr(a); err == nil {
						out = append(out, x.endpoint(netip.AddrPortFrom(addr.Unmap(), uint16(*sp.Port))))
					}
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b Endpoint) int { return a.Addr.Compare(b.Addr) })
	return slices.CompactFunc(out, func(a, b Endpoint) bool { return a.Addr == b.Addr })
}

func (x *Index) endpoint(a netip.AddrPort) Endpoint {
	e := Endpoint{Addr: a}
	if p := x.owner(a.Addr()); p != nil {
		e.Pod, e.ID, e.Sidecar = p.key, p.ident.id, p.sidecar
	}
	return e
}

func deref[T any](p *T) T {
	var zero T
	if p == nil {
		return zero
	}
	return *p
}
