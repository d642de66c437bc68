package policy

import (
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/mantlet/mantlet/verdict"
)

// services holds Services and their EndpointSlices, as they are; destination.go says what they mean to a client.
type services struct {
	byKey  map[string]*service // by "namespace/name"
	claims map[netip.Addr][]*service
	onNode map[portKey][]*service
	// external are addresses beyond cluster IPs and nodes.
	external externals
	slices   map[string]*service // by "namespace/name" of an EndpointSlice: the service that it belongs to
}

type service struct {
	key   string
	since time.Time    // creation of the Service object
	addrs []netip.Addr // cluster IPs; none for headless and ExternalName services
	ports []servicePort

	external []externalAddr

	slices map[string]*discoveryv1.EndpointSlice

	sticky      bool // sessionAffinity: ClientIP
	local       bool // internalTrafficPolicy: Local
	localAtNode bool // externalTrafficPolicy: Local
}

type servicePort struct {
	name     string
	protocol verdict.Protocol
	number   uint16
	onNode   uint16 // the port at which it is to be had at every node's own addresses; 0: none
}

type portKey struct {
	protocol verdict.Protocol
	number   uint16
}

func newServices() services {
	return services{byKey: map[string]*service{}, claims: map[netip.Addr][]*service{}, onNode: map[portKey][]*service{},
		external: externals{claims: map[netip.Addr]map[portKey][]claim{}}, slices: map[string]*service{}}
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
	s.unmap(v, c)
	v.since, v.addrs, v.ports = o.CreationTimestamp.Time, nil, nil
	v.sticky = o.Spec.SessionAffinity == corev1.ServiceAffinityClientIP
	v.local = deref(o.Spec.InternalTrafficPolicy) == corev1.ServiceInternalTrafficPolicyLocal
	v.localAtNode = o.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
	ips := o.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{o.Spec.ClusterIP}
	}
	if o.Spec.Type != corev1.ServiceTypeExternalName {
		for _, ip := range ips {
			if a, err := netip.ParseAddr(ip); err == nil { // "None" and "" are no addresses
				v.addrs = append(v.addrs, a.Unmap())
				c.addrs[a.Unmap()] = true
				s.claims[a.Unmap()] = append(s.claims[a.Unmap()], v)
			}
		}
	}
	for _, p := range o.Spec.Ports {
		proto, err := verdict.ParseProtocol(string(p.Protocol))
		if err != nil || p.Port < 1 || p.Port > 65535 {
			continue
		}
		sp := servicePort{name: p.Name, protocol: proto, number: uint16(p.Port)}
		if t := o.Spec.Type; (t == corev1.ServiceTypeNodePort || t == corev1.ServiceTypeLoadBalancer) && p.NodePort > 0 && p.NodePort < 65536 {
			sp.onNode = uint16(p.NodePort)
			at := portKey{proto, sp.onNode}
			s.onNode[at] = append(s.onNode[at], v)
			c.nodePorts[sp.onNode] = true
		}
		v.ports = append(v.ports, sp)
	}
	v.external = externalAddrs(o, v)
	s.claimExternal(v, c)
	c.services[v.key] = true
}

func (s *services) unmap(v *service, c *change) {
	s.disclaimExternal(v, c)
	for _, a := range v.addrs {
		c.addrs[a] = true
		s.claims[a] = slices.DeleteFunc(slices.Clone(s.claims[a]), func(o *service) bool { return o == v })
		if len(s.claims[a]) == 0 {
			delete(s.claims, a)
		}
	}
	for _, p := range v.ports {
		if p.onNode == 0 {
			continue
		}
		c.nodePorts[p.onNode] = true
		at := portKey{p.protocol, p.onNode}
		s.onNode[at] = slices.DeleteFunc(slices.Clone(s.onNode[at]), func(o *service) bool { return o == v })
		if len(s.onNode[at]) == 0 {
			delete(s.onNode, at)
		}
	}
}

// owner is the service that an address belongs to, or nil.
func (s *services) owner(a netip.Addr) *service { return newest(s.claims[a]) }

// newest is the service that something belongs to, or nil. Two claim it for a while where events of one come before those of the
// other; then it belongs to the newer one (by creation, then by name).
func newest(claims []*service) *service {
	var out *service
	for _, v := range claims {
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
	s.unmap(v, c)
	v.addrs, v.ports, v.external = nil, nil, nil
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

func deref[T any](p *T) T {
	var zero T
	if p == nil {
		return zero
	}
	return *p
}
