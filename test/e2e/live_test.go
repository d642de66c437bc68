package e2e

import (
	"context"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/server"
)

const liveManifests = `
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {mantlet.dev/inject: enabled, mantlet.dev/mtls: strict}}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, image: i}]}
---
apiVersion: v1
kind: Pod
metadata: {name: bystander, namespace: shop, labels: {app: bystander}}
spec: {containers: [{name: c, image: i}]}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {selector: {app: api}, ports: [{port: 80, targetPort: 8080}]}
`

// TestPolicyChangesReachOnlyWhomTheyConcern changes policy under running sidecars: what was allowed is denied once the sidecars have
// confirmed, by pod address and by Service, also for destinations that Envoy already holds a cluster of; and nobody else is pushed.
func TestPolicyChangesReachOnlyWhomTheyConcern(t *testing.T) {
	s := start(t, manifests(t, liveManifests), matrix.Options{})
	web, _ := s.Pod("shop/web")
	apiPod, _ := s.Pod("shop/api")
	ips := apiPod.Spec().IPs
	targets := []netns.Target{
		{Addr: at(ips[0].String(), 8080), Speaks: netns.ClientFirst, Nonce: "a"},
		{Addr: at(ips[1].String(), 8080), Speaks: netns.ClientFirst, Nonce: "b"},
		{Addr: at("10.96.0.2", 80), Speaks: netns.ClientFirst, Nonce: "c"},
	}
	reach := func(want bool) {
		t.Helper()
		outcomes, err := web.Probe(t.Context(), targets)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range outcomes {
			if (o.Reached == "shop/api:8080") != want {
				t.Errorf("web → %s: reached %q (%s, %s), want reached=%v", o.Target.Addr, o.Reached, o.Connect, o.Err, want)
			}
		}
	}
	reach(true)

	before := sent(s)
	step := func(what string, change func() error, want bool) {
		t.Helper()
		if err := change(); err != nil {
			t.Fatal(err)
		}
		confirmed(t, s, "shop/api", "shop/web", "shop/bystander")
		t.Log(what)
		reach(want)
	}
	cp := s.ControlPlane()
	deny := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: "api", Namespace: "shop"},
		Spec:       networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "api"}}},
	}
	step("api is isolated", func() error { return cp.Apply(deny) }, false)
	allow := deny.DeepCopy()
	allow.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
		{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}}}}}
	step("api admits web", func() error { return cp.Apply(allow) }, true)
	egress := deny.DeepCopy()
	egress.Name, egress.Spec.PodSelector.MatchLabels = "web", map[string]string{"app": "web"}
	egress.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	step("web may go nowhere", func() error { return cp.Apply(egress) }, false)
	step("web may go anywhere", func() error { return cp.Delete(egress) }, true)

	after := sent(s)
	if after["shop/bystander"] != before["shop/bystander"] {
		t.Errorf("the bystander was sent %d responses, none of which concerns it", after["shop/bystander"]-before["shop/bystander"])
	}
	for _, name := range []server.Client{"shop/api", "shop/web"} {
		if after[name] == before[name] {
			t.Errorf("%s was sent nothing: the count proves nothing", name)
		}
	}
}

// confirmed waits until sidecars have ACKed everything that was published for them.
func confirmed(t testing.TB, s *sandbox.Sandbox, pods ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, p := range pods {
		if err := s.ControlPlane().Server().Ledger().Wait(ctx, server.Client(p)); err != nil {
			t.Fatalf("%s: %v", p, err)
		}
	}
}

// sent counts the resources that each sidecar was sent.
func sent(s *sandbox.Sandbox) map[server.Client]uint64 {
	out := map[server.Client]uint64{}
	for _, c := range s.ControlPlane().Server().Ledger().Snapshot() {
		for _, n := range c.Counters {
			out[c.Client] += n.Resources
		}
	}
	return out
}
