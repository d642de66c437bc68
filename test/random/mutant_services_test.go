package random

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/test/oracle"
)

// serviceAddrs is how many cluster IPs there are.
const serviceAddrs = 3

// nodePorts are few, so that services want the same.
var nodePorts = []int32{30080, 30081}

// nodeAddrs are those that nodes have, or come to have.
var nodeAddrs = []string{"10.64.0.1", "172.18.0.3", "fd00:172:18::3", "203.0.113.9"}

// atNodes are the destinations that may be services' at nodes.
func atNodes() (out []netip.AddrPort) {
	for _, a := range nodeAddrs {
		for _, port := range nodePorts {
			out = append(out, netip.AddrPortFrom(netip.MustParseAddr(a), uint16(port)))
		}
	}
	return out
}

// externalAddrs are those that services name: outside, of nodes, of pods, and a cluster IP.
var externalAddrs = []string{"198.51.100.1", "203.0.113.9", "10.64.0.1", "172.18.0.3", "10.64.0.10", "10.64.1.11", "10.96.0.1", "fd00:172:18::3"}

// elsewhere are atNodes, and the destinations that may be services' at external addresses.
func elsewhere() []netip.AddrPort {
	out := atNodes()
	for _, a := range externalAddrs {
		for _, port := range servicePorts {
			out = append(out, netip.AddrPortFrom(netip.MustParseAddr(a), uint16(port)))
		}
	}
	return out
}

var servicePorts = []int32{80, 81}

func serviceAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 96, 0, byte(1 + i)}) }

// changeService changes one of three services, each with its own cluster IP, or one of their slices. Selectors are not followed
// here: whose addresses a slice holds is left to chance.
func (m *mutant) changeService() []event {
	n := m.IntN(serviceAddrs)
	name := fmt.Sprintf("svc%d", n)
	meta := metav1.ObjectMeta{Namespace: m.Objects.Namespaces[0].Name, Name: name}
	if m.chance(50) {
		s := &corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{ClusterIPs: []string{serviceAddr(n).String()}}}
		i := slices.IndexFunc(m.Objects.Services, func(s *corev1.Service) bool { return s.Name == name })
		if i >= 0 {
			m.Objects.Services = slices.Delete(slices.Clone(m.Objects.Services), i, i+1)
			if m.chance(40) {
				m.tell("service %s goes", name)
				return []event{{s, true}}
			}
		}
		for _, p := range servicePorts {
			if m.chance(70) {
				sp := corev1.ServicePort{Name: fmt.Sprint("p", p), Port: p, Protocol: m.protocol}
				if m.chance(30) {
					s.Spec.Type, sp.NodePort = corev1.ServiceTypeNodePort, choose(m.Rand, nodePorts)
				}
				s.Spec.Ports = append(s.Spec.Ports, sp)
			}
		}
		if m.chance(40) {
			s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		}
		if local := corev1.ServiceInternalTrafficPolicyLocal; m.chance(30) {
			s.Spec.InternalTrafficPolicy = &local
		}
		if s.Spec.Type == corev1.ServiceTypeNodePort && m.chance(30) {
			s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
		}
		m.changeExternal(s)
		m.tell("service %s: ports %v, affinity %q, local %t, at nodes %q", name, s.Spec.Ports, s.Spec.SessionAffinity, s.Spec.InternalTrafficPolicy != nil, s.Spec.ExternalTrafficPolicy)
		m.Objects.Services = append(slices.Clone(m.Objects.Services), s)
		return []event{{s, false}}
	}
	return m.changeSlice(name, meta)
}

// changeExternal gives a service addresses, and an age.
func (m *mutant) changeExternal(s *corev1.Service) {
	s.CreationTimestamp = metav1.Unix(int64(m.IntN(3)), 0)
	for _, a := range externalAddrs {
		switch m.IntN(10) {
		case 0, 1:
			s.Spec.ExternalIPs = append(s.Spec.ExternalIPs, a)
		case 2:
			mode := choose(m.Rand, []corev1.LoadBalancerIPMode{corev1.LoadBalancerIPModeVIP, corev1.LoadBalancerIPModeProxy})
			in := corev1.LoadBalancerIngress{IP: a, IPMode: &mode}
			if m.chance(50) {
				in.IPMode = nil
			}
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, in)
		}
	}
	if m.chance(30) {
		s.Spec.LoadBalancerSourceRanges = []string{choose(m.Rand, []string{"10.64.0.0/24", "10.64.1.0/24", "fd00::/8"})}
	}
	m.tell("service %s: since %s, external %v, of a load balancer %+v for %v", s.Name, s.CreationTimestamp.UTC(), s.Spec.ExternalIPs, s.Status.LoadBalancer.Ingress, s.Spec.LoadBalancerSourceRanges)
}

func (m *mutant) changeSlice(service string, meta metav1.ObjectMeta) []event {
	meta.Name = fmt.Sprint("slice", m.IntN(4)) // a slice may change its service
	s := &discoveryv1.EndpointSlice{ObjectMeta: meta, AddressType: discoveryv1.AddressTypeIPv4}
	s.Labels = map[string]string{discoveryv1.LabelServiceName: service}
	i := slices.IndexFunc(m.Objects.EndpointSlices, func(o *discoveryv1.EndpointSlice) bool { return o.Name == s.Name })
	if i >= 0 {
		old := m.Objects.EndpointSlices[i]
		m.Objects.EndpointSlices = slices.Delete(slices.Clone(m.Objects.EndpointSlices), i, i+1)
		if m.chance(30) {
			m.tell("endpoint slice %s goes", s.Name)
			return []event{{old, true}}
		}
	}
	for _, p := range servicePorts {
		name, port := fmt.Sprint("p", p), choose(m.Rand, []int32{80, 80, 8080, 8080, nodePorts[0]})
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port, Protocol: &m.protocol})
	}
	ready, hinted := choose(m.Rand, []int{0, 80, 100}), choose(m.Rand, []int{0, 50, 100, 100}) // in most slices all are alike: hints count only so
	for _, p := range m.Objects.Pods {
		for _, a := range oracle.Addresses(p) {
			if a.Is4() && m.chance(30) {
				s.Endpoints = append(s.Endpoints, m.endpoint(p, a, ready, hinted))
			}
		}
	}
	if m.chance(15) { // an address outside, which is nobody's
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{"203.0.113.9"}})
	}
	if m.chance(15) { // a node's
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{"172.18.0.3"}})
	}
	m.tell("endpoint slice %s: %d endpoints of %s, %d %% ready, %d %% with hints", s.Name, len(s.Endpoints), service, ready, hinted)
	m.Objects.EndpointSlices = append(slices.Clone(m.Objects.EndpointSlices), s)
	return []event{{s, false}}
}

// endpoint is a pod's, with conditions and hints as they fall.
func (m *mutant) endpoint(p *corev1.Pod, a netip.Addr, ready, hinted int) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: []string{a.String()}}
	is, serves, leaves := m.chance(ready), m.chance(50), m.chance(50)
	if !is || m.chance(50) { // absent means true
		e.Conditions = discoveryv1.EndpointConditions{Ready: &is, Serving: &serves, Terminating: &leaves}
	}
	if node := p.Spec.NodeName; m.chance(80) {
		e.NodeName = &node
	}
	if m.chance(hinted) {
		e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: choose(m.Rand, zones)}}}
		if m.chance(70) {
			e.Hints.ForNodes = []discoveryv1.ForNode{{Name: p.Spec.NodeName}}
		}
	}
	return e
}

var zones = []string{"east", "west"}

// changeNode puts a node into another zone, or none, or gives it other addresses; or takes it away.
func (m *mutant) changeNode() []event {
	i := m.IntN(len(m.Objects.Nodes))
	n := m.Objects.Nodes[i].DeepCopy()
	n.Labels = with(nil, corev1.LabelTopologyZone, choose(m.Rand, zones))
	if m.chance(25) {
		n.Labels = nil
	}
	if m.chance(50) {
		n.Status.Addresses = nil
		for _, a := range nodeAddrs {
			if m.chance(50) {
				n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: a})
			}
		}
	}
	gone := m.chance(15)
	if gone { // as far as it decides
		n.Labels, n.Status.Addresses = nil, nil
	}
	m.tell("node %s: labels %v, addresses %v", n.Name, n.Labels, n.Status.Addresses)
	m.Objects.Nodes = slices.Clone(m.Objects.Nodes)
	m.Objects.Nodes[i] = n
	return []event{{n, gone}}
}
