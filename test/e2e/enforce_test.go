package e2e

import (
	"slices"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox/matrix"
)

// BenchmarkEnforce edits a policy of the shop, with three replicas of everything, again and again, and reports how long it takes until
// the last affected sidecar has confirmed, and how many are pushed. Every edit narrows or widens what api may reach of db.
//
//	go test ./test/e2e -run '^$' -bench Enforce -benchtime 100x
func BenchmarkEnforce(b *testing.B) {
	m, err := source.ReadManifests([]string{"../../examples/shop"}, source.Options{Replicas: 3})
	if err != nil {
		b.Fatal(err)
	}
	s := start(b, m, matrix.Options{})
	var took []time.Duration
	pushed, bytes := 0, uint64(0)
	for i := range b.N {
		next := *m
		next.Objects.NetworkPolicies = nil
		for _, np := range m.Objects.NetworkPolicies {
			if np.Namespace+"/"+np.Name == "shop/db-from-api" {
				np = edited(np, i)
			}
			next.Objects.NetworkPolicies = append(next.Objects.NetworkPolicies, np)
		}
		c, err := s.Update(b.Context(), &next)
		if err != nil {
			b.Fatal(err)
		}
		if len(c.Sidecars) == 0 {
			b.Fatalf("edit %d reached nobody", i)
		}
		took = append(took, c.InForce)
		pushed += len(c.Sidecars)
		bytes += c.Bytes
	}
	slices.Sort(took)
	at := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))].Microseconds()) / 1000 }
	b.ReportMetric(at(0.5), "p50-ms")
	b.ReportMetric(at(0.9), "p90-ms")
	b.ReportMetric(at(0.99), "p99-ms")
	b.ReportMetric(float64(pushed)/float64(b.N), "sidecars/edit")
	b.ReportMetric(float64(bytes)/float64(b.N), "bytes/edit")
	b.ReportMetric(0, "ns/op")
}

// edited gives the policy's first rule a second port, another one each time.
func edited(np *networkingv1.NetworkPolicy, i int) *networkingv1.NetworkPolicy {
	np = np.DeepCopy()
	port := intstr.FromInt32(int32(10000 + i%1000))
	np.Spec.Ingress[0].Ports = append(np.Spec.Ingress[0].Ports, networkingv1.NetworkPolicyPort{Port: &port})
	return np
}
