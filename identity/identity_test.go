package identity

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("mantlet.local")

func TestReplicasShareAnIdentity(t *testing.T) {
	n := NewNamer(td, VolatileLabels())
	a, err := n.ID(Workload{Namespace: "shop", ServiceAccount: "web", Labels: map[string]string{"app": "web", "pod-template-hash": "1"}})
	if err != nil {
		t.Fatal(err)
	}
	b, _ := n.ID(Workload{Namespace: "shop", ServiceAccount: "web", Labels: map[string]string{"app": "web", "pod-template-hash": "2", "job-name": "x"}})
	if a != b {
		t.Errorf("volatile labels change the identity: %s and %s", a, b)
	}
	p, err := Parse(a)
	if err != nil || p.Namespace != "shop" || p.ServiceAccount != "web" {
		t.Errorf("Parse(%s) = %+v, %v", a, p, err)
	}
}

func TestIdentitiesDiffer(t *testing.T) {
	n := NewNamer(td, VolatileLabels())
	seen := map[spiffeid.ID]int{}
	for i, w := range []Workload{
		{Namespace: "a"},
		{Namespace: "b"},
		{Namespace: "a", ServiceAccount: "x"},
		{Namespace: "a", Labels: map[string]string{"k": "v"}},
		{Namespace: "a", Labels: map[string]string{"k": ""}},
		{Namespace: "a", Labels: map[string]string{"k": "v", "l": "w"}},
		{Namespace: "a", Labels: map[string]string{"k": "v\n1:l=1:w"}},
	} {
		id, err := n.ID(w)
		if err != nil {
			t.Fatal(err)
		}
		if j, dup := seen[id]; dup {
			t.Errorf("workloads %d and %d share %s", j, i, id)
		}
		seen[id] = i
	}
	if a, _ := n.ID(Workload{Namespace: "a"}); seen[a] != 0 {
		t.Error("an empty service account is not the same as before")
	}
	if a, _ := n.ID(Workload{Namespace: "a", ServiceAccount: "default"}); seen[a] != 0 {
		t.Error("an empty service account is not \"default\"")
	}
}

func TestParseRefuses(t *testing.T) {
	for _, s := range []string{
		"spiffe://mantlet.local",
		ControlPlane(td).String(),
		"spiffe://mantlet.local/ns/shop/sa/web",
		"spiffe://mantlet.local/ns/shop/sa/web/labels/abc",
		"spiffe://mantlet.local/sa/shop/ns/web/labels/0123456789abcdef0123456789abcdef",
		"spiffe://mantlet.local/ns/shop/sa/web/labels/0123456789abcdef0123456789abcdef/x",
	} {
		if _, err := Parse(spiffeid.RequireFromString(s)); err == nil {
			t.Errorf("Parse(%s) succeeds", s)
		}
	}
}
