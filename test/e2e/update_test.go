package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox/matrix"
)

// TestUpdateOfARunningSandbox edits manifests under a running sandbox: policies come and go, a workload scales, a pod gets other
// labels, another sidecar, goes; after each edit packets and evaluator agree on everything, an edit that changes nothing reaches nobody. Scaling
// pushes no TCP policy to anyone: identities stay, so that only endpoints (Cluster) change. UDP and SCTP are judged by address: whom a rule of them concerns, which
// a rule without ports is too, gets the list of addresses anew (Packets).
func TestUpdateOfARunningSandbox(t *testing.T) {
	const base = `
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: api, namespace: shop}
spec:
  replicas: 1
  selector: {matchLabels: {app: api}}
  template:
    metadata: {labels: {app: api}}
    spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {selector: {app: api}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web-from-api, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: api}}}]}]
`
	file := filepath.Join(t.TempDir(), "m.yaml")
	read := func(text string, previous *source.Manifests) *source.Manifests {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		replicas := 1
		if strings.Contains(text, "# scaled") {
			replicas = 3
		}
		m, err := source.ReadManifests([]string{file}, source.Options{Replicas: replicas, Previous: previous})
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	m := read(base, nil)
	s := start(t, m, matrix.Options{})
	check := func(m *source.Manifests) *matrix.Report {
		t.Helper()
		attempts, err := matrix.Plan(m, matrix.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return try(t, s, attempts).Report
	}
	first := check(m)
	for _, step := range []struct{ what, text string }{
		{"nothing", base},
		{"scaled", base + "# scaled"},
		{"isolate the api", base + "# scaled\n---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: api, namespace: shop}\nspec: {podSelector: {matchLabels: {app: api}}}"},
		{"relabel web", strings.Replace(base, "labels: {app: web}", "labels: {app: api}", 1)},
		{"web without sidecar", strings.Replace(base, "labels: {app: web}", "labels: {app: web}, annotations: {mantlet.dev/inject: \"false\"}", 1)},
		{"web is gone", strings.Split(base, "---\napiVersion: v1\nkind: Pod")[0]},
		{"as before", base},
	} {
		m = read(step.text, m)
		c, err := s.Update(t.Context(), m)
		if err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		t.Logf("%s: %v; in force after %s in %v, %d bytes", step.what, c.Objects, c.InForce, c.Sidecars, c.Bytes)
		check(m)
		if step.what == "nothing" && len(c.Sidecars)+len(c.Objects) > 0 {
			t.Errorf("no edit, and still: %+v", c)
		}
		// web's rule has no ports: for UDP and SCTP it is about api's addresses.
		if step.what == "scaled" && !slices.Equal(c.Types, []string{"Cluster", "Packets"}) {
			t.Errorf("scaling sent %v to those who were there: only endpoints, and the addresses of UDP and SCTP rules, may change", c.Types)
		}
	}
	last := check(m)
	if first.Summary != last.Summary {
		t.Errorf("back where it began, and the matrix is another: %+v, %+v", first.Summary, last.Summary)
	}
}
