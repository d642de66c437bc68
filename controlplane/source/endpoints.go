package source

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// sliceController is who makes the EndpointSlices of Services with a selector.
const sliceController = "endpointslice-controller.k8s.io"

// makeEndpointSlices makes the EndpointSlices of Services with a selector, as the cluster's controller would. Slices in the input
// stay, unless the controller made them of pods that are not the ones here.
func (r *reader) makeEndpointSlices() {
	podAt := map[netip.Addr]*corev1.Pod{}
	inNamespace := map[string][]*corev1.Pod{}
	for _, p := range r.pods {
		inNamespace[p.Namespace] = append(inNamespace[p.Namespace], p)
		for _, s := range podIPs(p) {
			if a, err := netip.ParseAddr(s); err == nil {
				podAt[a] = p
			}
		}
	}
	given := map[string][]*discoveryv1.EndpointSlice{} // by "namespace/service"
	for _, s := range r.slices {
		if name := s.Labels[discoveryv1.LabelServiceName]; name != "" {
			given[s.Namespace+"/"+name] = append(given[s.Namespace+"/"+name], s)
		}
	}
	stale := map[*discoveryv1.EndpointSlice]bool{}
	names := map[string]bool{}
	for _, svc := range r.services {
		key := svc.Namespace + "/" + svc.Name
		if len(svc.Spec.Selector) == 0 || svc.Spec.Type == corev1.ServiceTypeExternalName {
			continue
		}
		selector := labels.SelectorFromValidatedSet(svc.Spec.Selector)
		pods := slices.DeleteFunc(slices.Clone(inNamespace[svc.Namespace]), func(p *corev1.Pod) bool {
			return !selector.Matches(labels.Set(p.Labels))
		})
		if old := given[key]; len(old) > 0 {
			if !r.outdated(old, pods, podAt) {
				continue
			}
			for _, s := range old {
				stale[s] = true
			}
			r.warn("EndpointSlices of Service %s are of other pods than those here; made anew", key)
		}
		made := r.endpointSlices(svc, pods)
		for _, s := range made {
			for try := 0; names[s.Namespace+"/"+s.Name]; try++ {
				s.Name = svc.Name + "-" + safeHash(fmt.Appendf(nil, "%s %d", s.Name, try), 5)
			}
			names[s.Namespace+"/"+s.Name] = true
			r.slices = append(r.slices, s)
		}
		if len(made) == 0 && len(svc.Spec.Ports) > 0 && len(pods) == 0 {
			r.warn("Service %s selects no pod", key)
		}
	}
	r.slices = slices.DeleteFunc(r.slices, func(s *discoveryv1.EndpointSlice) bool { return stale[s] })
	for _, s := range r.slices {
		if r.origin[s] != nil {
			r.checkEndpoints(s, podAt)
		}
	}
}

// outdated reports whether slices that the controller made, and that an export holds, are of other pods than those here: of pods
// that the export does not hold, or made before pods that were made just now.
func (r *reader) outdated(given []*discoveryv1.EndpointSlice, selected []*corev1.Pod, podAt map[netip.Addr]*corev1.Pod) bool {
	listed := map[*corev1.Pod]bool{}
	for _, s := range given {
		if s.Labels[discoveryv1.LabelManagedBy] != sliceController {
			return false // a person's: theirs to decide
		}
		for _, e := range s.Endpoints {
			for _, a := range e.Addresses {
				addr, err := netip.ParseAddr(a)
				if err != nil {
					continue
				}
				p := podAt[addr]
				if p == nil && (e.TargetRef == nil || !r.leftOut[e.TargetRef.Namespace+"/"+e.TargetRef.Name]) {
					return true
				}
				listed[p] = true
			}
		}
	}
	return slices.ContainsFunc(selected, func(p *corev1.Pod) bool {
		made := r.origin[p].kind != "Pod"
		return made && !listed[p]
	})
}

// checkEndpoints refuses endpoints in the pod network that are no pods: whose they are could not be said.
func (r *reader) checkEndpoints(s *discoveryv1.EndpointSlice, podAt map[netip.Addr]*corev1.Pod) {
	for i, e := range s.Endpoints {
		for j, a := range e.Addresses {
			addr, err := netip.ParseAddr(a)
			if err != nil || podAt[addr] != nil || slices.Contains(nodeIPs, addr) {
				continue
			}
			if slices.ContainsFunc(podRanges, func(p netip.Prefix) bool { return p.Contains(addr) }) {
				r.wrong(s, fmt.Sprintf("endpoints[%d].addresses[%d]", i, j), fmt.Sprintf("%s is in the pod network, and no pod has it", a),
					"give a pod that address in status.podIPs, or use an address outside of the pod network")
			}
		}
	}
}

// endpointSlices makes the slices of a Service: one for each family and each set of ports that pods resolve the Service's to.
func (r *reader) endpointSlices(svc *corev1.Service, pods []*corev1.Pod) []*discoveryv1.EndpointSlice {
	bySet := map[string]*discoveryv1.EndpointSlice{}
	var order []string
	unresolved := map[string]bool{}
	for _, p := range pods {
		ports, missing := endpointPorts(svc, p)
		for _, name := range missing {
			unresolved[name] = true
		}
		if len(ports) == 0 && len(svc.Spec.Ports) > 0 {
			continue
		}
		for _, f := range svc.Spec.IPFamilies {
			addr := addressOf(p, f)
			if addr == "" {
				continue
			}
			set := string(f)
			for _, ep := range ports {
				set += fmt.Sprintf(" %s=%d/%s", *ep.Name, *ep.Port, *ep.Protocol)
			}
			s, ok := bySet[set]
			if !ok {
				s = newSlice(svc, f, ports, set)
				bySet[set] = s
				order = append(order, set)
			}
			s.Endpoints = append(s.Endpoints, endpoint(svc, p, addr))
		}
	}
	if len(unresolved) > 0 {
		var list []string
		for name := range unresolved {
			list = append(list, name)
		}
		slices.Sort(list)
		r.warn("Service %s/%s selects pods without a port that its targetPort names: %s", svc.Namespace, svc.Name, strings.Join(list, ", "))
	}
	var out []*discoveryv1.EndpointSlice
	for _, set := range order {
		out = append(out, bySet[set])
	}
	return out
}

func newSlice(svc *corev1.Service, f corev1.IPFamily, ports []discoveryv1.EndpointPort, set string) *discoveryv1.EndpointSlice {
	yes := true
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: svc.Namespace, Name: svc.Name + "-" + safeHash([]byte(svc.Name+" "+set), 5),
			Labels:          map[string]string{discoveryv1.LabelServiceName: svc.Name, discoveryv1.LabelManagedBy: sliceController},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Service", Name: svc.Name, UID: svc.UID, Controller: &yes}},
		},
		AddressType: discoveryv1.AddressType(f), Ports: ports,
	}
	if headless(svc) {
		s.Labels[corev1.IsHeadlessService] = ""
	}
	return s
}

func endpoint(svc *corev1.Service, p *corev1.Pod, addr string) discoveryv1.Endpoint {
	serving, _ := readiness(p)
	terminating := p.DeletionTimestamp != nil
	ready := svc.Spec.PublishNotReadyAddresses || serving && !terminating
	e := discoveryv1.Endpoint{
		Addresses:  []string{addr},
		Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating},
		NodeName:   &p.Spec.NodeName,
		TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID},
	}
	if p.Spec.Hostname != "" && p.Spec.Subdomain == svc.Name {
		e.Hostname = &p.Spec.Hostname
	}
	return e
}

// endpointPorts resolves a Service's ports at one pod, and names the target ports that the pod does not have.
func endpointPorts(svc *corev1.Service, p *corev1.Pod) (ports []discoveryv1.EndpointPort, missing []string) {
	for i := range svc.Spec.Ports {
		sp := &svc.Spec.Ports[i]
		number, ok := targetPort(sp, p)
		if !ok {
			missing = append(missing, sp.TargetPort.StrVal)
			continue
		}
		ports = append(ports, discoveryv1.EndpointPort{Name: &sp.Name, Port: &number, Protocol: &sp.Protocol, AppProtocol: sp.AppProtocol})
	}
	return ports, missing
}

func targetPort(sp *corev1.ServicePort, p *corev1.Pod) (int32, bool) {
	if sp.TargetPort.Type == intstr.Int {
		return sp.TargetPort.IntVal, true
	}
	named := func(c *corev1.Container) (int32, bool) {
		for _, cp := range c.Ports {
			if cp.Name == sp.TargetPort.StrVal && cp.Protocol == sp.Protocol {
				return cp.ContainerPort, true
			}
		}
		return 0, false
	}
	for i := range p.Spec.Containers {
		if n, ok := named(&p.Spec.Containers[i]); ok {
			return n, true
		}
	}
	for i := range p.Spec.InitContainers { // sidecars
		c := &p.Spec.InitContainers[i]
		if n, ok := named(c); ok && c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			return n, true
		}
	}
	return 0, false
}

// addressOf is a pod's address of one family; "" if it has none.
func addressOf(p *corev1.Pod, f corev1.IPFamily) string {
	for _, s := range podIPs(p) {
		if a, err := netip.ParseAddr(s); err == nil && families[familyIndex(a)] == f {
			return s
		}
	}
	return ""
}
