package controlplane

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/xds/server"
)

// TestRenumber: with other ranges a control plane publishes what one publishes that was started with them, and still knows what is retired.
func TestRenumber(t *testing.T) {
	var (
		first  = []netip.Prefix{netip.MustParsePrefix("10.64.0.0/24")}
		both   = append(slices.Clone(first), netip.MustParsePrefix("10.64.1.0/24"))
		before = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}
		after  = append(slices.Clone(before), netip.MustParsePrefix("10.97.0.0/16"))
	)
	objects := &policy.Objects{
		Pods: []*corev1.Pod{injected("db", "db", "1", "10.64.0.1"), injected("api", "api", "2", "10.64.1.2")},
		NetworkPolicies: []*networkingv1.NetworkPolicy{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db"},
			Spec: networkingv1.NetworkPolicySpec{Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
				{IPBlock: &networkingv1.IPBlock{CIDR: "10.64.0.0/16", Except: []string{"10.64.1.0/28"}}}}}}},
		}},
	}
	start := func(pods, services []netip.Prefix) *ControlPlane {
		t.Helper()
		cp, err := New(Config{SVIDTTL: time.Hour, ServiceNetwork: services, Policy: policy.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString("td.example"), PodNetwork: pods}}, server.Config{Authenticator: noStreams{}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(cp.Close)
		if err := cp.Load(objects); err != nil {
			t.Fatal(err)
		}
		return cp
	}
	versions := func(cp *ControlPlane) (out []string) {
		for _, c := range cp.Server().Ledger().Snapshot() {
			for _, r := range c.Resources {
				out = append(out, string(c.Client)+" "+r.Type+" "+r.Name+" "+r.Wanted)
			}
		}
		return out
	}
	cp, fresh := start(first, before), start(both, after)
	if slices.Equal(versions(cp), versions(fresh)) {
		t.Fatal("the ranges make no difference here: the test shows nothing")
	}
	if err := cp.Renumber(both, after, objects); err != nil {
		t.Fatal(err)
	}
	if got, want := versions(cp), versions(fresh); !slices.Equal(got, want) {
		t.Errorf("renumbered:\n%q\nstarted so:\n%q", got, want)
	}

	if err := cp.Apply(injected("api", "other", "2", "10.64.1.2")); err != nil { // relabelled: its old identity is retired
		t.Fatal(err)
	}
	objects.Pods[1] = injected("api", "other", "2", "10.64.1.2")
	if err := cp.Renumber(both, before, objects); err != nil {
		t.Fatal(err)
	}
	if _, retired := cp.index.NextExpiry(); !retired {
		t.Error("what was retired is forgotten")
	}
	objects.Pods = objects.Pods[:1]
	if err := cp.Renumber(both, after, objects); err != nil {
		t.Fatal(err)
	}
	if _, known := cp.Server().Ledger().Status("shop/api"); known {
		t.Error("a pod that is gone is still served")
	}
}
