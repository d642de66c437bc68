package controlplane

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// wantedBy lists the versions that a sidecar should have, by resource.
func wantedBy(cp *ControlPlane, pod string) map[string]string {
	out := map[string]string{}
	st, _ := cp.Server().Ledger().Status(server.Client(pod))
	for _, r := range st.Resources {
		out[r.Name] = r.Wanted
	}
	return out
}

// TestExternalAddressesArePublished: a sidecar is sent its outbound listener and its network anew when an external address of a service comes or goes,
// over TCP, and nothing at all when a service changes otherwise.
func TestExternalAddressesArePublished(t *testing.T) {
	w := newTown(t)
	const pod = "shop/api-3"
	before := wantedBy(w.ControlPlane, pod)
	if len(before) == 0 {
		t.Fatalf("no sidecar %s", pod)
	}
	for _, c := range []struct{ spec, status, changed string }{
		{"{clusterIPs: [10.96.0.1], ports: [{port: 80}]}", "{}", ""},
		{"{clusterIPs: [10.96.0.1], ports: [{port: 80}], externalIPs: [203.0.113.1]}", "{}", "network outbound"},
		{"{clusterIPs: [10.96.0.1], ports: [{port: 80}], externalIPs: [203.0.113.1], sessionAffinity: ClientIP}", "{}", ""},
		{"{clusterIPs: [10.96.0.1], ports: [{port: 80}]}", "{loadBalancer: {ingress: [{ip: 203.0.113.1}]}}", ""}, // the same, now of a load balancer
		{"{clusterIPs: [10.96.0.1], ports: [{port: 80}]}", "{loadBalancer: {ingress: [{ip: 203.0.113.1}, {ip: 203.0.113.2, ipMode: Proxy}]}}", ""},
		{"{clusterIPs: [10.96.0.1], ports: [{port: 80}, {name: alt, port: 81}]}", "{loadBalancer: {ingress: [{ip: 203.0.113.1}]}}", "network outbound"},
		{"{clusterIPs: [10.96.0.1], ports: [{port: 80}]}", "{}", "network outbound"},
		{"{clusterIPs: [10.96.0.1], ports: [{port: 53, protocol: UDP}], externalIPs: [203.0.113.1]}", "{}", "packets"},
		{"{clusterIPs: [10.96.0.1], ports: [{port: 80}]}", "{}", "packets"},
	} {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "front"}}
		for text, into := range map[string]any{c.spec: &s.Spec, c.status: &s.Status} {
			if err := yaml.UnmarshalStrict([]byte(text), into); err != nil {
				t.Fatal(err)
			}
		}
		w.apply(s)
		now := wantedBy(w.ControlPlane, pod)
		var changed []string
		for _, name := range []string{names.Gate, names.Inbound, names.Network, names.Outbound, names.Packets, names.RBAC, names.Verdicts} {
			if now[name] != before[name] {
				changed = append(changed, name)
			}
		}
		if got := strings.Join(changed, " "); got != c.changed || len(now) != len(before) {
			t.Errorf("%s %s: %q was sent, want %q", c.spec, c.status, got, c.changed)
		}
		before = now
	}
	if fresh := newTown(t); !maps.Equal(wantedBy(fresh.ControlPlane, pod), before) {
		t.Error("with no external address it is not as if there had been none")
	}
}

// TestDeniedOutside: what policy denies at a port that is asked about, outside the cluster, is a cluster without endpoints, by which the sidecar's log tells
// it from what nobody has, and is another one when policy admits it.
func TestDeniedOutside(t *testing.T) {
	w := newTown(t)
	const pod, name = "shop/api-3", "od|198.51.100.1:30443"
	endpoints := func() string {
		r, ok := w.Resolve(pod, name)
		if !ok {
			return "unknown"
		}
		c := new(clusterv3.Cluster)
		if err := r.Any.UnmarshalTo(c); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(len(c.GetLoadAssignment().GetEndpoints()))
	}
	if got := endpoints(); got != "1" {
		t.Errorf("%s endpoints where nothing isolates the pod", got)
	}
	w = newTown(t) // in which nobody has asked yet
	for _, c := range []struct{ egress, want string }{
		{"[]", "0"},
		{"[{to: [{ipBlock: {cidr: 198.51.100.0/24}}]}]", "1"},
		{"[{to: [{ipBlock: {cidr: 203.0.113.0/24}}]}]", "0"},
	} {
		p := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "egress"}}
		if err := yaml.UnmarshalStrict([]byte("{podSelector: {}, policyTypes: [Egress], egress: "+c.egress+"}"), &p.Spec); err != nil {
			t.Fatal(err)
		}
		w.apply(p)
		if got := endpoints(); got != c.want {
			t.Errorf("egress %s: %s endpoints, want %s", c.egress, got, c.want)
		}
	}
}

// TestContestsAreLogged, by whoever comes last: who names what is somebody else's is told of.
func TestContestsAreLogged(t *testing.T) {
	var log bytes.Buffer
	cp, err := New(Config{NodePorts: verdict.PortRange{First: 31000, Last: 31999}, Log: slog.New(slog.NewTextHandler(&log, nil)),
		Policy: policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"), PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}},
		server.Config{Authenticator: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cp.Close)
	service := func(name, clusterIP string, externalIPs ...string) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name},
			Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, ClusterIPs: []string{clusterIP}, ExternalIPs: externalIPs, Ports: []corev1.ServicePort{{Port: 80, NodePort: 31080}}}}
	}
	if err := cp.Load(&policy.Objects{Services: []*corev1.Service{service("a", "10.96.0.1", "203.0.113.1"), service("b", "10.96.0.2", "203.0.113.1")}}); err != nil {
		t.Fatal(err)
	}
	if err := cp.Apply(service("c", "10.96.0.3", "10.96.0.1")); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`address=203.0.113.1:80 protocol=TCP has="service shop/a" "claimed by"=[shop/b]`, `address=10.96.0.1:80 protocol=TCP has="cluster IP of service shop/a" "claimed by"=[shop/c]`} {
		if n := strings.Count(log.String(), want); n != 1 {
			t.Errorf("%d times in the log: %s\n%s", n, want, log.String())
		}
	}
	if strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("a node port inside the range is an error:\n%s", log.String())
	}
	late := service("d", "10.96.0.4")
	late.Spec.Ports[0].NodePort = 30080
	if err := cp.Apply(late); err != nil || !strings.Contains(log.String(), fmt.Sprintf("port=%d range=31000-31999", 30080)) {
		t.Errorf("%v\n%s", err, log.String())
	}
}
