package oracle

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"
)

// Shrink drops whatever it can from a World for which fails holds, as long as it still does: policies, pods and namespaces, then
// rules, peers, ports, exceptions and labels. No single further drop would keep the failure. The World given stays as it was.
func Shrink(w World, fails func(World) bool) World {
	for progress := true; progress; {
		progress = false
		for i := 0; ; i++ { // cut(copy, i) makes the i-th of all possible cuts
			smaller := w.clone()
			if !cut(&smaller, i) {
				break
			}
			if fails(smaller) {
				w, progress = smaller, true
				i-- // what followed moved up
			}
		}
	}
	return w
}

// cut makes the n-th cut and reports whether there are so many.
func cut(w *World, n int) bool {
	drop := func(length int, remove func(i int)) bool {
		if n < length {
			remove(n)
			return true
		}
		n -= length
		return false
	}
	o := &w.Objects
	if drop(len(o.NetworkPolicies), func(i int) { o.NetworkPolicies = slices.Delete(o.NetworkPolicies, i, i+1) }) ||
		drop(len(o.Pods), func(i int) { o.Pods = slices.Delete(o.Pods, i, i+1) }) {
		return true
	}
	for i, ns := range o.Namespaces { // only those that nothing lives in
		used := slices.ContainsFunc(o.Pods, func(p *corev1.Pod) bool { return p.Namespace == ns.Name }) ||
			slices.ContainsFunc(o.NetworkPolicies, func(np *networkingv1.NetworkPolicy) bool { return np.Namespace == ns.Name })
		if !used && drop(1, func(int) { o.Namespaces = slices.Delete(o.Namespaces, i, i+1) }) {
			return true
		}
	}
	for _, np := range o.NetworkPolicies {
		s := &np.Spec
		if drop(len(s.Ingress), func(i int) { s.Ingress = slices.Delete(s.Ingress, i, i+1) }) ||
			drop(len(s.Egress), func(i int) { s.Egress = slices.Delete(s.Egress, i, i+1) }) {
			return true
		}
		for i := range s.Ingress {
			if r := &s.Ingress[i]; cutList(&r.From, drop) || cutList(&r.Ports, drop) {
				return true
			}
		}
		for i := range s.Egress {
			if r := &s.Egress[i]; cutList(&r.To, drop) || cutList(&r.Ports, drop) {
				return true
			}
		}
		for _, peer := range allPeers(np) {
			if b := peer.IPBlock; b != nil && drop(len(b.Except), func(i int) { b.Except = slices.Delete(b.Except, i, i+1) }) {
				return true
			}
		}
	}
	for _, p := range o.Pods {
		if cutList(&p.Spec.InitContainers, drop) || cutList(&p.Spec.Containers, drop) {
			return true
		}
		for i := range p.Spec.Containers {
			if c := &p.Spec.Containers[i]; drop(len(c.Ports), func(i int) { c.Ports = slices.Delete(c.Ports, i, i+1) }) {
				return true
			}
		}
		keys := make([]string, 0, len(p.Labels))
		for k := range p.Labels {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		if drop(len(keys), func(i int) { delete(p.Labels, keys[i]) }) {
			return true
		}
	}
	return false
}

// cutList drops one of several: dropping the last would turn "these" into "any".
func cutList[T any](list *[]T, drop func(int, func(int)) bool) bool {
	return len(*list) > 1 && drop(len(*list), func(i int) { *list = slices.Delete(*list, i, i+1) })
}

type (
	peerOf = networkingv1.NetworkPolicyPeer
	portOf = networkingv1.NetworkPolicyPort
)

func allPeers(np *networkingv1.NetworkPolicy) []peerOf {
	var list []peerOf
	for _, rule := range np.Spec.Ingress {
		list = append(list, rule.From...)
	}
	for _, rule := range np.Spec.Egress {
		list = append(list, rule.To...)
	}
	return list
}

func (w World) clone() World {
	w.Objects.Namespaces = deepCopies(w.Objects.Namespaces)
	w.Objects.Pods = deepCopies(w.Objects.Pods)
	w.Objects.NetworkPolicies = deepCopies(w.Objects.NetworkPolicies)
	return w
}

func deepCopies[T interface{ DeepCopy() T }](list []T) []T {
	copies := make([]T, len(list))
	for i, o := range list {
		copies[i] = o.DeepCopy()
	}
	return copies
}

// YAML prints the World as manifests that reproduce it; the comment on top holds what is no manifest.
func (w World) YAML() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# pod network %v, default mode %s\n", w.PodNetwork, w.Mode)
	document := func(o any) {
		text, err := yaml.Marshal(o)
		if err != nil { // API objects are plain data
			panic(fmt.Sprintf("oracle: write a manifest: %v", err))
		}
		b.WriteString("---\n")
		b.Write(text)
	}
	for _, o := range w.Objects.Nodes {
		document(o)
	}
	for _, o := range w.Objects.Namespaces {
		document(o)
	}
	for _, o := range w.Objects.Pods {
		document(o)
	}
	for _, o := range w.Objects.NetworkPolicies {
		document(o)
	}
	return b.String()
}
