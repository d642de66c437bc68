package kube

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/cluster/apitest"
)

var (
	seed    = flag.Uint64("seed", 0, "of the random run; 0: another one each time")
	changes = flag.Int("changes", 400, "how many changes the random run makes")
)

// TestRandomChanges: whatever is created, changed and deleted, and although the API server is restarted meanwhile, who has watched it all ends where
// one is that lists the cluster then.
func TestRandomChanges(t *testing.T) {
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-seed %d", *seed)
	s := dualStack(t)
	c := apitest.Client(t, s)
	given := Networks{Pods: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}
	d := &dice{rand.New(rand.NewPCG(*seed, 1))}
	for _, n := range []string{"a", "b", "c"} {
		write(t, c, d.namespace(n))
	}
	watcher := run(t, Config{Client: apitest.Client(t, s), Networks: given})
	restarts := map[int]bool{*changes / 3: true, *changes * 2 / 3: true}
	for i := range *changes {
		if restarts[i] {
			if err := s.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.change(t.Context(), c); err != nil {
			t.Fatalf("change %d: %v", i, err)
		}
	}
	lister := run(t, Config{Client: apitest.Client(t, s), Networks: given})
	list, err := c.CoreV1().Services(metav1.NamespaceAll).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var services []*corev1.Service
	for i := range list.Items {
		services = append(services, &list.Items[i])
	}
	watcher.until(t, services, func() map[string]string { return lister.state(services) })
	is := lister.state(services)
	t.Logf("%d changes arrived as %d updates; %d answers are the same", *changes, watcher.updates, len(is))
	if lister.updates > 0 || len(is) < 20 {
		t.Errorf("the one that has only listed was updated %d times, and gives %d answers: the test shows little", lister.updates, len(is))
	}
}

// dice draws objects with few names, so that they meet.
type dice struct{ *rand.Rand }

func pick[T any](d *dice, list ...T) T { return list[d.IntN(len(list))] }

func (d *dice) labels() map[string]string {
	out := map[string]string{"app": pick(d, "x", "y", "z")}
	if d.IntN(3) == 0 {
		out["pod-template-hash"] = pick(d, "1", "2")
	}
	return out
}

func (d *dice) meta(kind string, of int) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: pick(d, "a", "b", "c"), Name: fmt.Sprintf("%s-%d", kind, d.IntN(of))}
}

func (d *dice) namespace(name string) *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"team": pick(d, "red", "blue")}}}
	if d.IntN(2) == 0 {
		n.Labels[policy.ModeLabel] = pick(d, "strict", "permissive", "nonsense")
	}
	return n
}

func (d *dice) node() *corev1.Node {
	i := d.IntN(3)
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("n%d", i), Labels: map[string]string{corev1.LabelTopologyZone: pick(d, "z1", "z2")}},
		Spec:       corev1.NodeSpec{PodCIDRs: []string{fmt.Sprintf("10.%d.%d.0/24", 64+i, i)}},
		Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("192.0.2.%d", 1+d.IntN(4))}}},
	}
}

// pod is drawn with one node for each name: the API server does not move pods.
func (d *dice) pod() *corev1.Pod {
	meta := d.meta("pod", 6)
	meta.Labels = d.labels()
	n := int(meta.Name[4]-'0') % 3
	p := &corev1.Pod{ObjectMeta: meta, Spec: corev1.PodSpec{
		NodeName:   fmt.Sprintf("n%d", n),
		Containers: []corev1.Container{{Name: "app", Image: "localhost/app:1", Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: pick[int32](d, 80, 8080)}}}},
	}}
	if d.IntN(2) == 0 {
		p.Spec.InitContainers = []corev1.Container{sidecar()}
	}
	p.Status.Phase = pick(d, corev1.PodPending, corev1.PodRunning, corev1.PodRunning, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed)
	if d.IntN(5) > 0 { // the bridge's address is among them
		p.Status.PodIP = fmt.Sprintf("10.%d.%d.%d", 64+n, n, 1+d.IntN(20))
		p.Status.PodIPs = []corev1.PodIP{{IP: p.Status.PodIP}}
	}
	return p
}

func (d *dice) policy() *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{ObjectMeta: d.meta("policy", 3)}
	selector := func() *metav1.LabelSelector { return &metav1.LabelSelector{MatchLabels: d.labels()} }
	peer := func() networkingv1.NetworkPolicyPeer {
		switch d.IntN(3) {
		case 0:
			return networkingv1.NetworkPolicyPeer{PodSelector: selector()}
		case 1:
			return networkingv1.NetworkPolicyPeer{PodSelector: selector(),
				NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": pick(d, "red", "blue")}}}
		}
		return networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: pick(d, "10.64.0.0/16", "10.65.1.0/28", "198.51.100.0/24")}}
	}
	port := networkingv1.NetworkPolicyPort{Port: &intstr.IntOrString{Type: intstr.String, StrVal: "web"}}
	if d.IntN(2) == 0 {
		np.Spec.PodSelector = *selector()
	}
	np.Spec.PolicyTypes = pick(d, []networkingv1.PolicyType{"Ingress"}, []networkingv1.PolicyType{"Egress"}, []networkingv1.PolicyType{"Ingress", "Egress"})
	np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{peer(), peer()}, Ports: []networkingv1.NetworkPolicyPort{port}}}
	np.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{peer()}}}
	return np
}

func (d *dice) service() *corev1.Service {
	return &corev1.Service{ObjectMeta: d.meta("service", 2), Spec: corev1.ServiceSpec{
		SessionAffinity: pick(d, corev1.ServiceAffinityNone, corev1.ServiceAffinityClientIP),
		Ports:           []corev1.ServicePort{{Port: pick[int32](d, 80, 81)}},
	}}
}

func (d *dice) endpoints() *discoveryv1.EndpointSlice {
	meta := d.meta("slice", 3)
	meta.Labels = map[string]string{discoveryv1.LabelServiceName: pick(d, "service-0", "service-1")}
	port := pick[int32](d, 80, 8080)
	s := &discoveryv1.EndpointSlice{ObjectMeta: meta, AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Port: &port, Name: new(string)}}}
	for range 1 + d.IntN(3) {
		n := d.IntN(3)
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{fmt.Sprintf("10.%d.%d.%d", 64+n, n, 2+d.IntN(20))}})
	}
	return s
}

// change makes one.
func (d *dice) change(ctx context.Context, c kubernetes.Interface) error {
	var o metav1.Object
	switch n := d.IntN(20); {
	case n < 9:
		o = d.pod()
	case n < 13:
		o = d.policy()
	case n < 15:
		o = d.service()
	case n < 17:
		o = d.endpoints()
	case n < 19:
		o = d.node()
	default:
		return put(ctx, c, d.namespace(pick(d, "a", "b", "c")))
	}
	if d.IntN(4) == 0 {
		return remove(ctx, c, o)
	}
	return put(ctx, c, o)
}
