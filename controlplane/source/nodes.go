package source

import (
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// defaultNode is where pods run that name no node.
const defaultNode = "node"

// makeNodes makes the nodes that pods run on, with the labels that their manifests give them. Whatever they are called, all of them
// share one machine and its addresses here: which node a pod is on decides what Services mean to it, and nothing else.
func (r *reader) makeNodes() {
	given := map[string]*corev1.Node{}
	for _, n := range r.nodes {
		given[n.Name] = n
	}
	used := map[string]bool{}
	for _, p := range r.pods {
		used[p.Spec.NodeName] = true
	}
	r.nodes = nil
	for _, name := range slices.Sorted(maps.Keys(used)) {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}}
		if g := given[name]; g != nil {
			maps.Copy(n.Labels, g.Labels)
		}
		n.Labels[corev1.LabelHostname] = name
		for _, a := range nodeIPs {
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
		}
		r.nodes = append(r.nodes, n)
	}
	for i := range r.slices {
		r.placeEndpoints(r.slices[i])
	}
}

// placeEndpoints completes the slices that were made here: the zones of their endpoints, and the hints that spec.trafficDistribution
// asks for (core/v1 ServiceSpec; the controller gives them to ready endpoints, of their own node and zone).
func (r *reader) placeEndpoints(s *discoveryv1.EndpointSlice) {
	if r.origin[s] != nil {
		return
	}
	wish := r.trafficDistribution(s)
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		at := slices.IndexFunc(r.nodes, func(n *corev1.Node) bool { return n.Name == *e.NodeName })
		if zone := r.nodes[at].Labels[corev1.LabelTopologyZone]; zone != "" {
			e.Zone = &zone
		}
		if wish == "" || !*e.Conditions.Ready {
			continue
		}
		h := &discoveryv1.EndpointHints{}
		if e.Zone != nil {
			h.ForZones = []discoveryv1.ForZone{{Name: *e.Zone}}
		}
		if wish == corev1.ServiceTrafficDistributionPreferSameNode {
			h.ForNodes = []discoveryv1.ForNode{{Name: *e.NodeName}}
		}
		if h.ForZones != nil || h.ForNodes != nil {
			e.Hints = h
		}
	}
}

func (r *reader) trafficDistribution(s *discoveryv1.EndpointSlice) string {
	for _, svc := range r.services {
		if svc.Namespace == s.Namespace && svc.Name == s.Labels[discoveryv1.LabelServiceName] && svc.Spec.TrafficDistribution != nil {
			return *svc.Spec.TrafficDistribution
		}
	}
	return ""
}

// noteServices says what of Services cannot be tried here.
func (r *reader) noteServices() {
	var names, proxies, ranges []string
	for _, s := range r.services {
		if len(s.Spec.LoadBalancerSourceRanges) > 0 && len(s.Status.LoadBalancer.Ingress) > 0 {
			ranges = append(ranges, s.Namespace+"/"+s.Name)
		}
		switch {
		case s.Spec.Type == corev1.ServiceTypeExternalName:
			names = append(names, s.Namespace+"/"+s.Name)
		case slices.ContainsFunc(s.Status.LoadBalancer.Ingress, func(in corev1.LoadBalancerIngress) bool {
			return in.IP == "" || in.IPMode != nil && *in.IPMode == corev1.LoadBalancerIPModeProxy
		}):
			proxies = append(proxies, s.Namespace+"/"+s.Name)
		}
	}
	if len(names) > 0 {
		r.warn("Services of type ExternalName have no address that could be tried: a connection is judged by ipBlock, at the address that the name resolves to: %s", strings.Join(names, ", "))
	}
	if len(ranges) > 0 {
		r.warn("loadBalancerSourceRanges are kept by sidecars only; here nobody does it for pods without one: %s", strings.Join(ranges, ", "))
	}
	if len(proxies) > 0 {
		r.warn("load balancers that are proxies (status.loadBalancer.ingress with a hostname, or ipMode: Proxy) are not tried; from inside, a connection there is judged by ipBlock: %s",
			strings.Join(proxies, ", "))
	}
}
