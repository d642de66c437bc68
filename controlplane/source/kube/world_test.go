package kube

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func node(name, addr string, ranges ...string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: ranges},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: addr}, {Type: corev1.NodeExternalIP, Address: "203.0.113.9"}}}}
}

func pod(name, on string, ips ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, Spec: corev1.PodSpec{NodeName: on}}
	for _, ip := range ips {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
	}
	return p
}

func onHost(p *corev1.Pod) *corev1.Pod {
	p.Spec.HostNetwork = true
	return p
}

func serviceCIDR(name string, cidrs ...string) *networkingv1.ServiceCIDR {
	return &networkingv1.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: networkingv1.ServiceCIDRSpec{CIDRs: cidrs}}
}

// step is what a watch says in one breath.
func step(t *testing.T, w *world, deleted bool, objects ...metav1.Object) (said string) {
	t.Helper()
	q := newQueue()
	for _, o := range objects {
		o = slimOf(t, o)
		k, _ := kindOf(o)
		q.put(change{key{k, o.GetNamespace(), o.GetName()}, o, deleted})
	}
	applied, gone := w.take(q.take())
	var words []string
	for _, o := range gone {
		words = append(words, "-"+o.GetName())
	}
	for _, o := range applied {
		word := o.GetName()
		if p, ok := o.(*corev1.Pod); ok {
			var ips []string
			for _, h := range p.Status.HostIPs {
				ips = append(ips, h.IP)
			}
			word += fmt.Sprint(ips)
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

// TestNodeAddresses: a pod's own node reaches it from its internal addresses and from the bridge, and those follow the node.
func TestNodeAddresses(t *testing.T) {
	w := newWorld(Networks{}, []netip.Addr{netip.MustParseAddr("169.254.7.7")})
	for _, s := range []struct {
		name    string
		deleted bool
		objects []metav1.Object
		want    string
	}{
		{"no node yet", false, []metav1.Object{pod("a", "")}, "a[]"},
		{"a node that is not known yet", false, []metav1.Object{pod("a", "n1", "10.0.1.5")}, "a[169.254.7.7]"},
		{"the node comes, and its pods with it; its external address is no matter to them", false, []metav1.Object{node("n1", "192.0.2.1", "10.0.1.0/24", "fd00:1::/64")},
			"n1 a[10.0.1.1 169.254.7.7 192.0.2.1 fd00:1::1]"},
		{"another node is no matter to them", false, []metav1.Object{node("n2", "192.0.2.2", "10.0.2.0/24")}, "n2"},
		{"a pod on the node's network has no address of its own", false, []metav1.Object{onHost(pod("h", "n1", "10.0.1.1"))},
			"h[10.0.1.1 169.254.7.7 192.0.2.1 fd00:1::1]"},
		{"a pod that was given the bridge's address has it", false, []metav1.Object{pod("b", "n2", "10.0.1.1")},
			"a[169.254.7.7 192.0.2.1 fd00:1::1] b[10.0.2.1 169.254.7.7 192.0.2.2] h[169.254.7.7 192.0.2.1 fd00:1::1]"},
		{"and when it goes it is the bridge's again", true, []metav1.Object{pod("b", "n2", "10.0.1.1")},
			"-b a[10.0.1.1 169.254.7.7 192.0.2.1 fd00:1::1] h[10.0.1.1 169.254.7.7 192.0.2.1 fd00:1::1]"},
		{"other addresses, and a new pod, in one breath", false, []metav1.Object{node("n1", "192.0.2.3", "10.0.1.0/24"), pod("c", "n1", "10.0.1.6")},
			"n1 a[10.0.1.1 169.254.7.7 192.0.2.3] c[10.0.1.1 169.254.7.7 192.0.2.3] h[10.0.1.1 169.254.7.7 192.0.2.3]"},
		{"the node goes first", true, []metav1.Object{node("n1", "192.0.2.3", "10.0.1.0/24")}, "-n1 a[169.254.7.7] c[169.254.7.7] h[169.254.7.7]"},
		{"its pods follow", true, []metav1.Object{pod("a", "n1", "10.0.1.5"), pod("c", "n1", "10.0.1.6"), onHost(pod("h", "n1", "10.0.1.1"))}, "-a -c -h"},
	} {
		if got := step(t, w, s.deleted, s.objects...); got != s.want {
			t.Errorf("%s:\n got %s\nwant %s", s.name, got, s.want)
		}
	}
	if len(w.onNode)+len(w.has) > 0 || len(w.bridge) != 1 {
		t.Errorf("pods and nodes that are gone are remembered: %v, %v, %v", w.onNode, w.has, w.bridge)
	}
}

// TestNetworks: the cluster's ranges are those that are given and those that its objects name, each once.
func TestNetworks(t *testing.T) {
	w := newWorld(Networks{Pods: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}}, nil)
	check := func(what string, pods, services string) {
		t.Helper()
		n := w.networks()
		if got := fmt.Sprint(n.Pods); got != pods {
			t.Errorf("%s: pods %s, want %s", what, got, pods)
		}
		if got := fmt.Sprint(n.Services); got != services {
			t.Errorf("%s: services %s, want %s", what, got, services)
		}
		w.ranged = false
	}
	check("by configuration", "[10.0.0.0/16]", "[]")
	step(t, w, false, node("n1", "192.0.2.1", "10.0.1.0/24", "fd00:1::/64"), serviceCIDR("kubernetes", "10.96.0.0/16", "fd00:96::/108"))
	check("a node and the first ranges", "[10.0.0.0/16 fd00:1::/64]", "[10.96.0.0/16 fd00:96::/108]")
	step(t, w, false, node("n2", "192.0.2.2", "10.1.2.0/24"), serviceCIDR("more", "10.97.0.0/24", "10.96.0.0/12"))
	check("more of both", "[10.0.0.0/16 10.1.2.0/24 fd00:1::/64]", "[10.96.0.0/12 fd00:96::/108]")
	step(t, w, false, node("n2", "192.0.2.7", "10.1.2.0/24"))
	if w.ranged {
		t.Error("a node's address is taken for a change of the ranges")
	}
	step(t, w, true, node("n2", "192.0.2.7", "10.1.2.0/24"), serviceCIDR("more"))
	if !w.ranged {
		t.Error("ranges went, and nobody was told")
	}
	check("less of both", "[10.0.0.0/16 fd00:1::/64]", "[10.96.0.0/16 fd00:96::/108]")
}

// TestQueueKeepsTheLatest: what is not taken over yet is one state for each object, in order of kinds.
func TestQueueKeepsTheLatest(t *testing.T) {
	w := newWorld(Networks{}, nil)
	q := newQueue()
	put := func(o metav1.Object, deleted bool) {
		k, _ := kindOf(o)
		q.put(change{key{k, o.GetNamespace(), o.GetName()}, o, deleted})
	}
	put(pod("a", "n1", "10.0.1.5"), false)
	put(pod("a", "n1", "10.0.1.5"), true)
	put(pod("a", "n1", "10.0.1.7"), false)
	put(pod("b", "n1"), false)
	put(pod("b", "n1"), true)
	put(node("n1", "192.0.2.1"), false)
	if len(q.filled) != 1 {
		t.Error("nobody is told")
	}
	applied, deleted := w.take(q.take())
	if len(applied) != 2 || applied[0].GetName() != "n1" || applied[1].(*corev1.Pod).Status.PodIPs[0].IP != "10.0.1.7" || len(deleted) != 1 || deleted[0].GetName() != "b" {
		t.Errorf("got %v and without %v", applied, deleted)
	}
	if len(q.take()) != 0 {
		t.Error("taken twice")
	}
}
