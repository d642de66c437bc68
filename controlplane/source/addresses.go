package source

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// The network that everything runs in. The first address of each pod range is the node's.
var (
	podRanges     = []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16"), netip.MustParsePrefix("fd00:10:64::/64")}
	serviceRanges = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")}
	nodeIPs       = []netip.Addr{netip.MustParseAddr("10.64.0.1"), netip.MustParseAddr("fd00:10:64::1")}
)

// families are those of Kubernetes, at the index that they have in the ranges above.
var families = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}

// network is the addresses of one sort of thing: pods, or Services.
type network struct {
	ranges  []netip.Prefix
	next    []netip.Addr
	kept    map[string][]netip.Addr // "namespace/name" → addresses that it had before
	keepers map[netip.Addr]bool     // all of kept: drawn for nobody else
	outside []netip.Prefix          // host prefixes of given addresses that no range holds
}

func newNetwork(ranges []netip.Prefix) *network {
	n := &network{ranges: ranges, kept: map[string][]netip.Addr{}, keepers: map[netip.Addr]bool{}}
	for _, p := range ranges {
		n.next = append(n.next, p.Addr().Next().Next())
	}
	return n
}

// note takes an address in that a manifest gave.
func (n *network) note(a netip.Addr) {
	if !slices.ContainsFunc(n.ranges, func(p netip.Prefix) bool { return p.Contains(a) }) {
		n.outside = append(n.outside, netip.PrefixFrom(a, a.BitLen()))
	}
}

// draw gives the next free address of a family; the last of an IPv4 range is for broadcasts.
func (n *network) draw(family int, taken map[netip.Addr]metav1.Object) (netip.Addr, bool) {
	for a := n.next[family]; n.ranges[family].Contains(a.Next()); a = a.Next() {
		if _, ok := taken[a]; !ok && !n.keepers[a] {
			n.next[family] = a.Next()
			return a, true
		}
	}
	return netip.Addr{}, false
}

// keep reserves the addresses that an object had before.
func (n *network) keep(key string, addrs []string) {
	for _, s := range addrs {
		if a, err := parseAddr(s); err == nil && slices.ContainsFunc(n.ranges, func(p netip.Prefix) bool { return p.Contains(a) }) {
			n.kept[key] = append(n.kept[key], a)
			n.keepers[a] = true
		}
	}
}

// before returns the address of a family that an object had before, if it is still free.
func (n *network) before(key string, family int, taken map[netip.Addr]metav1.Object) (netip.Addr, bool) {
	for _, a := range n.kept[key] {
		if _, ok := taken[a]; !ok && n.ranges[family].Contains(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

func (n *network) prefixes() []netip.Prefix {
	slices.SortFunc(n.outside, func(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) })
	return append(slices.Clone(n.ranges), n.outside...)
}

// assignAddresses gives every pod and Service the addresses that its manifest names, and the others, in order of their names, the
// next ones that are free. So a name keeps its address as long as no name before it comes or goes.
func (r *reader) assignAddresses() {
	r.podNetwork, r.serviceNetwork = newNetwork(podRanges), newNetwork(serviceRanges)
	r.keepAddresses()
	taken := map[netip.Addr]metav1.Object{}
	claim := func(o metav1.Object, n *network, field string, addrs []string) {
		for _, s := range addrs {
			a, err := parseAddr(s)
			if err != nil {
				continue // "None"; the checks have refused the rest
			}
			if other, ok := taken[a]; ok {
				it := r.origin[other]
				r.wrong(o, field, fmt.Sprintf("%s is the address of %s too, at %s", a, it.object(), it.place()), "give each its own")
				continue
			}
			taken[a] = o
			n.note(a)
		}
	}
	for _, p := range r.pods {
		claim(p, r.podNetwork, podIPField(p), podIPs(p))
	}
	for _, s := range r.services {
		if s.Spec.Type != corev1.ServiceTypeExternalName {
			claim(s, r.serviceNetwork, clusterIPField(s), clusterIPs(s))
		}
	}
	for _, p := range r.pods {
		addrs := podIPs(p)
		if len(addrs) == 0 {
			addrs = r.drawEach(p, r.podNetwork, families, taken)
		}
		setPodIPs(p, addrs)
	}
	for _, s := range r.services {
		r.completeService(s, taken)
	}
}

// keepAddresses reserves for those that are still there what they had in the manifests before.
func (r *reader) keepAddresses() {
	if r.o.Previous == nil {
		return
	}
	pods, services := map[string][]string{}, map[string][]string{}
	for _, p := range r.o.Previous.Objects.Pods {
		pods[p.Namespace+"/"+p.Name] = podIPs(p)
	}
	for _, s := range r.o.Previous.Objects.Services {
		services[s.Namespace+"/"+s.Name] = s.Spec.ClusterIPs
	}
	for _, p := range r.pods {
		r.podNetwork.keep(p.Namespace+"/"+p.Name, pods[p.Namespace+"/"+p.Name])
	}
	for _, s := range r.services {
		r.serviceNetwork.keep(s.Namespace+"/"+s.Name, services[s.Namespace+"/"+s.Name])
	}
}

// drawEach draws one address of each family.
func (r *reader) drawEach(o metav1.Object, n *network, wanted []corev1.IPFamily, taken map[netip.Addr]metav1.Object) []string {
	var out []string
	for _, f := range wanted {
		i := slices.Index(families, f)
		a, ok := n.before(o.GetNamespace()+"/"+o.GetName(), i, taken)
		if !ok {
			a, ok = n.draw(i, taken)
		}
		if !ok {
			r.wrong(o, "", fmt.Sprintf("no address is left in %s", n.ranges[i]), "read fewer manifests, or ask for fewer replicas")
			return out
		}
		taken[a] = o
		out = append(out, a.String())
	}
	return out
}

func setPodIPs(p *corev1.Pod, addrs []string) {
	p.Status.PodIP, p.Status.PodIPs = "", nil
	for _, s := range addrs {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: canonical(s)})
	}
	if len(p.Status.PodIPs) > 0 {
		p.Status.PodIP = p.Status.PodIPs[0].IP
	}
}

func canonical(s string) string {
	if a, err := netip.ParseAddr(s); err == nil {
		return a.String()
	}
	return s
}

// clusterIPs are the addresses that a manifest gives a Service; "None" makes it headless.
func clusterIPs(s *corev1.Service) []string {
	if len(s.Spec.ClusterIPs) == 0 && s.Spec.ClusterIP != "" {
		return []string{s.Spec.ClusterIP}
	}
	return s.Spec.ClusterIPs
}

func clusterIPField(s *corev1.Service) string {
	if len(s.Spec.ClusterIPs) == 0 {
		return "spec.clusterIP"
	}
	return "spec.clusterIPs"
}

func headless(s *corev1.Service) bool {
	return slices.Equal(clusterIPs(s), []string{corev1.ClusterIPNone})
}

// completeService fills in what the API server would: defaults, families, cluster IPs.
func (r *reader) completeService(s *corev1.Service, taken map[netip.Addr]metav1.Object) {
	if s.Spec.Type == "" {
		s.Spec.Type = corev1.ServiceTypeClusterIP
	}
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		p.Protocol = protocolOr(p.Protocol)
		if p.TargetPort == (intstr.IntOrString{}) {
			p.TargetPort = intstr.FromInt32(p.Port)
		}
	}
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		s.Spec.ClusterIP, s.Spec.ClusterIPs = "", nil
		return
	}
	given := clusterIPs(s)
	s.Spec.IPFamilies = serviceFamilies(s, given)
	ips := slices.Clone(given)
	for i := range ips {
		ips[i] = canonical(ips[i])
	}
	if !headless(s) && len(ips) < len(s.Spec.IPFamilies) {
		ips = append(ips, r.drawEach(s, r.serviceNetwork, s.Spec.IPFamilies[len(ips):], taken)...)
	}
	s.Spec.ClusterIPs = ips
	if len(ips) > 0 {
		s.Spec.ClusterIP = ips[0]
	}
	if s.Spec.IPFamilyPolicy == nil {
		p := corev1.IPFamilyPolicyPreferDualStack
		if len(s.Spec.IPFamilies) == 1 {
			p = corev1.IPFamilyPolicySingleStack
		}
		s.Spec.IPFamilyPolicy = &p
	}
}

// serviceFamilies says which families a Service has, the first one first. Addresses that are given decide, then what the manifest
// asks for; one that asks for nothing gets both, because the network here has both.
func serviceFamilies(s *corev1.Service, given []string) []corev1.IPFamily {
	var out []corev1.IPFamily
	for _, ip := range given {
		if a, err := netip.ParseAddr(ip); err == nil {
			out = append(out, families[familyIndex(a)])
		}
	}
	asked := s.Spec.IPFamilies
	if len(out) == 0 {
		out = slices.Clone(asked)
	}
	p := s.Spec.IPFamilyPolicy
	switch {
	case p != nil && *p == corev1.IPFamilyPolicySingleStack:
		out = append(out, families[0])[:1]
	case p != nil || len(out) == 0 || len(asked) == 2: // dual stack
		for _, f := range families {
			if !slices.Contains(out, f) {
				out = append(out, f)
			}
		}
	}
	return out
}

func familyIndex(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
