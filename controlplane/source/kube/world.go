package kube

import (
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// world is what has been taken over, and what one object says of others: nodes of their pods, all of the cluster's ranges.
type world struct {
	given   Networks     // by configuration
	extra   []netip.Addr // from which every node may speak to its pods, by configuration
	objects map[key]metav1.Object
	onNode  map[string]map[key]bool // pods by node
	has     map[netip.Addr]int      // how many pods say that an address is theirs
	bridge  map[netip.Addr]string   // first addresses of nodes' ranges, and of which node
	ranged  bool                    // something was taken over that changes the ranges
}

func newWorld(given Networks, extra []netip.Addr) *world {
	return &world{given: given, extra: extra, objects: map[key]metav1.Object{}, onNode: map[string]map[key]bool{},
		has: map[netip.Addr]int{}, bridge: map[netip.Addr]string{}}
}

// take takes changes over, and returns what that means to a policy.Index: nodes that change change their pods.
func (w *world) take(changes []change) (applied, deleted []metav1.Object) {
	again := map[key]bool{} // pods whose node's addresses may be others
	touch := func(node string) { maps.Copy(again, w.onNode[node]) }
	for _, c := range changes {
		old := w.objects[c.key]
		if c.deleted {
			delete(w.objects, c.key)
		} else {
			w.objects[c.key] = c.object
		}
		switch c.key.kind {
		case serviceCIDRs: // says nothing to an index
			w.ranged = true
			continue
		case nodes:
			w.ranged = w.ranged || !slices.Equal(podCIDRs(old), podCIDRs(w.objects[c.key]))
			w.moveBridges(old, w.objects[c.key])
			touch(c.key.name)
		case pods:
			for _, node := range w.movePod(c.key, old, w.objects[c.key]) {
				touch(node)
			}
			if !c.deleted {
				again[c.key] = true
			}
		}
		switch {
		case c.deleted:
			deleted = append(deleted, c.object)
		case c.key.kind != pods: // pods follow, when all is known of their nodes
			applied = append(applied, c.object)
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(again), compareKeys) {
		if p, ok := w.objects[k].(*corev1.Pod); ok { // else it went in the same breath
			applied = append(applied, w.complete(p))
		}
	}
	return applied, deleted
}

// movePod follows on which node a pod is and which addresses it has, and returns the nodes of whose bridges it has, or had, the address.
func (w *world) movePod(k key, old, next metav1.Object) (nodes []string) {
	if p, ok := old.(*corev1.Pod); ok {
		delete(w.onNode[p.Spec.NodeName], k)
		if len(w.onNode[p.Spec.NodeName]) == 0 {
			delete(w.onNode, p.Spec.NodeName)
		}
	}
	if p, ok := next.(*corev1.Pod); ok {
		if w.onNode[p.Spec.NodeName] == nil {
			w.onNode[p.Spec.NodeName] = map[key]bool{}
		}
		w.onNode[p.Spec.NodeName][k] = true
	}
	was, is := ownAddrs(old), ownAddrs(next)
	if slices.Equal(was, is) {
		return nil
	}
	for _, a := range was {
		if w.has[a]--; w.has[a] == 0 {
			delete(w.has, a)
		}
	}
	for _, a := range is {
		w.has[a]++
	}
	for _, a := range slices.Concat(was, is) {
		if node, ok := w.bridge[a]; ok {
			nodes = append(nodes, node)
		}
	}
	return nodes
}

func (w *world) moveBridges(old, next metav1.Object) {
	if n, ok := old.(*corev1.Node); ok {
		for _, a := range bridges(n) {
			delete(w.bridge, a)
		}
	}
	if n, ok := next.(*corev1.Node); ok {
		for _, a := range bridges(n) {
			w.bridge[a] = n.Name
		}
	}
}

// complete is a pod with all addresses from which its node may speak to it in status.hostIPs. Before it has a node it has none.
func (w *world) complete(p *corev1.Pod) *corev1.Pod {
	out := *p
	out.Status.HostIP, out.Status.HostIPs = "", nil
	for _, a := range w.nodeAddrs(p) {
		out.Status.HostIPs = append(out.Status.HostIPs, corev1.HostIP{IP: a.String()})
	}
	return &out
}

func (w *world) nodeAddrs(p *corev1.Pod) (out []netip.Addr) {
	if p.Spec.NodeName == "" {
		return nil
	}
	add := func(list ...netip.Addr) {
		for _, a := range list {
			if !slices.Contains(out, a) {
				out = append(out, a)
			}
		}
	}
	add(parseAddrs(p.Status.HostIP)...)
	for _, h := range p.Status.HostIPs {
		add(parseAddrs(h.IP)...)
	}
	if n, ok := w.objects[key{kind: nodes, name: p.Spec.NodeName}].(*corev1.Node); ok {
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP { // what comes from an external one has been outside
				add(parseAddrs(a.Address)...)
			}
		}
		for _, a := range bridges(n) {
			if w.has[a] == 0 {
				add(a)
			}
		}
	}
	add(w.extra...)
	slices.SortFunc(out, netip.Addr.Compare) // one order for all pods of a node: they share what is made of it
	return out
}

// bridges are the first addresses of a node's ranges, which CNI's host-local allocator gives to the bridge (its default for a range's gateway).
func bridges(n *corev1.Node) (out []netip.Addr) {
	for _, p := range podCIDRs(n) {
		if a := p.Addr().Next(); p.Contains(a) {
			out = append(out, a)
		}
	}
	return out
}

func podCIDRs(o metav1.Object) []netip.Prefix {
	n, ok := o.(*corev1.Node)
	if !ok {
		return nil
	}
	list := n.Spec.PodCIDRs
	if len(list) == 0 {
		list = []string{n.Spec.PodCIDR}
	}
	return parsePrefixes(list)
}

// ownAddrs are the addresses that a pod has of its own: none on the node's network.
func ownAddrs(o metav1.Object) (out []netip.Addr) {
	p, ok := o.(*corev1.Pod)
	if !ok || p.Spec.HostNetwork {
		return nil
	}
	if len(p.Status.PodIPs) == 0 {
		return parseAddrs(p.Status.PodIP)
	}
	for _, ip := range p.Status.PodIPs {
		out = append(out, parseAddrs(ip.IP)...)
	}
	return out
}

// networks are the ranges that are given, and those of nodes and of Service addresses.
func (w *world) networks() Networks {
	n := Networks{Pods: slices.Clone(w.given.Pods), Services: slices.Clone(w.given.Services)}
	for _, o := range w.objects {
		switch o := o.(type) {
		case *corev1.Node:
			n.Pods = append(n.Pods, podCIDRs(o)...)
		case *networkingv1.ServiceCIDR:
			n.Services = append(n.Services, parsePrefixes(o.Spec.CIDRs)...)
		}
	}
	return Networks{Pods: outermost(n.Pods), Services: outermost(n.Services)}
}

// all is everything that has been taken over, sorted.
func (w *world) all() *policy.Objects {
	o := &policy.Objects{}
	for _, k := range slices.SortedFunc(maps.Keys(w.objects), compareKeys) {
		switch v := w.objects[k].(type) {
		case *corev1.Namespace:
			o.Namespaces = append(o.Namespaces, v)
		case *corev1.Node:
			o.Nodes = append(o.Nodes, v)
		case *corev1.Pod:
			o.Pods = append(o.Pods, w.complete(v))
		case *corev1.Service:
			o.Services = append(o.Services, v)
		case *discoveryv1.EndpointSlice:
			o.EndpointSlices = append(o.EndpointSlices, v)
		case *networkingv1.NetworkPolicy:
			o.NetworkPolicies = append(o.NetworkPolicies, v)
		}
	}
	return o
}
