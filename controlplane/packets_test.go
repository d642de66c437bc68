package controlplane

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// town is a control plane with pods that have sidecars, all on one node, in which db hears api over TCP, and dns hears web over UDP.
type town struct {
	*ControlPlane
	t    *testing.T
	pods int
}

func newTown(t *testing.T) *town {
	t.Helper()
	cp, err := New(Config{Policy: policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"),
		PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}}, server.Config{Authenticator: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	w := &town{cp, t, 0}
	if err := cp.Load(&policy.Objects{}); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{
		`{metadata: {name: db, namespace: shop}, spec: {podSelector: {matchLabels: {app: db}},
			ingress: [{from: [{podSelector: {matchLabels: {app: api}}}], ports: [{port: 5432}]}]}}`,
		`{metadata: {name: dns, namespace: shop}, spec: {podSelector: {matchLabels: {app: dns}},
			ingress: [{from: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 53, protocol: UDP}]}]}}`,
	} {
		np := &networkingv1.NetworkPolicy{}
		if err := yaml.UnmarshalStrict([]byte(text), np); err != nil {
			t.Fatal(err)
		}
		w.apply(np)
	}
	for _, app := range []string{"db", "db", "api", "dns", "dns", "web"} {
		w.scale(app)
	}
	return w
}

func (w *town) apply(o metav1.Object) {
	w.t.Helper()
	if err := w.Apply(o); err != nil {
		w.t.Fatal(err)
	}
}

// scale adds a replica and returns its name.
func (w *town) scale(app string) string {
	w.t.Helper()
	p := w.pod(app)
	w.apply(p)
	return "shop/" + p.Name
}

func (w *town) pod(app string) *corev1.Pod {
	w.pods++
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: fmt.Sprintf("%s-%d", app, w.pods), Labels: map[string]string{"app": app},
			Annotations: map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: netip.AddrFrom4([4]byte{10, 64, byte(w.pods >> 8), byte(w.pods)}).String()}},
			HostIPs: []corev1.HostIP{{IP: "192.0.2.1"}}},
	}
}

// published are the versions of the packet policies that are published.
func (w *town) published() map[string]string {
	out := map[string]string{}
	for _, st := range w.Server().Ledger().Snapshot() {
		for _, r := range st.Resources {
			if r.Type == names.TypePackets {
				out[string(st.Client)] = r.Wanted
			}
		}
	}
	return out
}

// compiled are the packet policies as the index has them: another pointer where it compiled anew.
func (w *town) compiled() map[string]any {
	out := map[string]any{}
	for key, nodes := range w.packets {
		for node, is := range nodes {
			out[key+node] = is.value
		}
	}
	return out
}

// TestScalingPushesPacketsToWhomTheyConcern adds replicas: of a workload that only TCP rules name, and of one that a UDP rule names.
func TestScalingPushesPacketsToWhomTheyConcern(t *testing.T) {
	w := newTown(t)
	for _, c := range []struct {
		app   string
		hears string // the app whose pods are pushed; empty: nobody is
	}{{"api", ""}, {"db", ""}, {"dns", ""}, {"web", "dns"}, {"api", ""}} {
		versions, values := w.published(), w.compiled()
		fresh := w.scale(c.app)
		for name, version := range w.published() {
			want := c.hears != "" && strings.HasPrefix(name, "shop/"+c.hears+"-")
			if got := version != versions[name]; got != want && name != fresh {
				t.Errorf("one more %s pushes packets to %s: %v, want %v", c.app, name, got, want)
			}
		}
		if c.hears == "" && !maps.Equal(values, w.compiled()) {
			t.Errorf("one more %s has packets compiled that it has nothing to do with", c.app)
		}
	}
}

// TestScalingPushesPacketsOfRulesWithoutPorts: such a rule is one for UDP, too. Of egress those hear who may send to the replica.
func TestScalingPushesPacketsOfRulesWithoutPorts(t *testing.T) {
	for _, c := range []struct{ spec, app, hears string }{
		{`{podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: api}}}]}]}`, "api", "db"},
		{`{podSelector: {matchLabels: {app: api}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]}`, "db", "api"},
		{`{podSelector: {matchLabels: {app: api}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: db}}}], ports: [{port: 5432}]}]}`, "db", ""},
	} {
		w := newTown(t)
		np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "more"}}
		if err := yaml.UnmarshalStrict([]byte(c.spec), &np.Spec); err != nil {
			t.Fatal(err)
		}
		w.apply(np)
		versions := w.published()
		fresh := w.scale(c.app)
		for name, version := range w.published() {
			want := c.hears != "" && strings.HasPrefix(name, "shop/"+c.hears+"-")
			if got := version != versions[name]; got != want && name != fresh {
				t.Errorf("%s: one more %s pushes packets to %s: %v, want %v", c.spec, c.app, name, got, want)
			}
		}
	}
}

// TestScalingPushesPacketsOfServices: who may use a service of UDP is told of its endpoints before any use.
func TestScalingPushesPacketsOfServices(t *testing.T) {
	w := newTown(t)
	w.apply(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "dns"},
		Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.96.0.10"}, ClusterIP: "10.96.0.10", Ports: []corev1.ServicePort{{Protocol: corev1.ProtocolUDP, Port: 53}}}})
	behind := func(addrs ...string) *discoveryv1.EndpointSlice {
		s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "dns-1", Labels: map[string]string{discoveryv1.LabelServiceName: "dns"}},
			AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Protocol: new(corev1.ProtocolUDP), Port: new(int32(53))}}}
		for _, a := range addrs {
			s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a}})
		}
		return s
	}
	w.apply(behind("10.64.0.4"))
	versions := w.published()
	w.apply(behind("10.64.0.4", "10.64.0.5"))
	pushed := 0
	for name, version := range w.published() {
		may := strings.HasPrefix(name, "shop/web-") || name == "shop/dns-5" // who is an endpoint reaches itself
		if got := version != versions[name]; got != may {
			t.Errorf("one more endpoint of dns pushes packets to %s: %v, want %v", name, got, may)
		} else if got {
			pushed++
		}
	}
	if pushed == 0 {
		t.Error("nobody has heard of the endpoint")
	}
}

// Replicas on one node share the very bytes, and an address costs a dozen of them.
func TestPacketsAreShared(t *testing.T) {
	w := newTown(t)
	const replicas = 1000
	var more []metav1.Object
	for range replicas {
		more = append(more, w.pod("web"))
	}
	if err := w.Update(more, nil); err != nil {
		t.Fatal(err)
	}
	var sizes []int
	for key, nodes := range w.packets {
		if len(nodes) != 1 {
			t.Errorf("%s: %d packet policies for pods on one node", key, len(nodes))
		}
		for _, is := range nodes {
			sizes = append(sizes, len(is.resource.Any.Value))
		}
	}
	slices.Sort(sizes)
	t.Logf("packet policies with %d web pods, in bytes: %v", replicas+1, sizes)
	if n := len(sizes); n != 4 || sizes[n-1] > 14*replicas || sizes[n-2] > 200 {
		t.Errorf("%v bytes for db, api, dns and web", sizes)
	}
}
