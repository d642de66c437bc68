package random

import (
	"math/rand/v2"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds"
)

// FuzzCompile puts whatever decodes as a NetworkPolicy into a small world. The compiler must not panic. Where the API server would
// accept the policy it must agree with the oracle; where it would not, the policy must open nothing: whatever is admitted with it
// at the pods that it selects is admitted without it, too.
func FuzzCompile(f *testing.F) {
	for i := range uint64(20) {
		w := oracle.Generate(rand.New(rand.NewPCG(i, 0)), oracle.Small)
		for _, np := range w.Objects.NetworkPolicies {
			text, err := yaml.Marshal(np)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(text)
		}
	}
	f.Add([]byte(`{metadata: {name: a, namespace: ns0}, spec: {podSelector: {}, ingress: [{from: [{}]}]}}`))
	f.Add([]byte(`{metadata: {name: a, namespace: ns0}, spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: x}}]}]}}`))
	f.Add([]byte(`{metadata: {name: a, namespace: ns0}, spec: {podSelector: {matchExpressions: [{key: a, operator: Nope}]}, policyTypes: [Both]}}`))
	f.Add([]byte(`{metadata: {name: a, namespace: ns0}, spec: {podSelector: {}, egress: [{ports: [{port: 90, endPort: 80}]}]}}`))
	base := oracle.Generate(rand.New(rand.NewPCG(3, 0)), oracle.Small)
	base.Objects.NetworkPolicies = nil
	// All permissive: at a strict pod that nothing isolates, an ipBlock of a sound rule does open.
	base.Mode = verdict.Permissive
	for _, ns := range base.Objects.Namespaces {
		delete(ns.Labels, policy.ModeLabel)
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		np := &networkingv1.NetworkPolicy{}
		if yaml.Unmarshal(text, np) != nil {
			t.Skip("not a NetworkPolicy")
		}
		np.Namespace, np.Name = base.Objects.Namespaces[0].Name, "fuzzed"
		w := base
		w.Objects.NetworkPolicies = []*networkingv1.NetworkPolicy{np}
		x, err := indexOf(w)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range x.SubjectKeys() {
			v := x.Verdicts(k)
			xds.Gate(v)
			xds.RBAC(v)
			xds.Outbound(v, &verdict.Network{Cluster: w.PodNetwork})
		}
		if len(policy.Validate(np)) == 0 {
			if c, got, why, found := differ(w); found {
				t.Fatalf("%s\ncompiler: %+v\noracle: %s\n%s", c, got, why, w.YAML())
			}
			return
		}
		if len(x.Problems()) == 0 {
			t.Fatal("an invalid policy is not named by Problems")
		}
		before, err := indexOf(base)
		if err != nil {
			t.Fatal(err)
		}
		for i, c := range base.Connections() {
			if i%7 == 0 && answer(x, c).Allowed && !answer(before, c).Allowed {
				t.Fatalf("an invalid policy opens %s\n%s", c, w.YAML())
			}
		}
	})
}
