package incluster

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// What README shows: a labelled namespace, its pods with sidecars, and a policy. Who is admitted gets through, who is not is refused by connect()
// itself, the first time too, at the pod's own address and at the Service's. status says so, by its exit code as well.
func TestSmoke(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "shop")
	example, err := os.ReadFile(filepath.Join("..", "..", "docs", "kubernetes-example.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	p.apply(string(example))
	p.ready("deployment/api", "pod/web", "pod/evil")
	p.inForce("api-from-web")
	// README's own words.
	p.kubectl("exec", "web", "-c", "app", "--", "/agnhost", "connect", "--timeout=3s", "api.shop:80")
	if _, err := w.Cluster.Kubectl(t.Context(), "", "-n", "shop", "exec", "evil", "-c", "app", "--", "/agnhost", "connect", "--timeout=3s", "api.shop:80"); err == nil ||
		!strings.Contains(err.Error(), "REFUSED") {
		t.Errorf("evil to api: got %v, want REFUSED", err)
	}

	p.apply(labelled("caller", "web", ""), client("stranger", ""))
	p.ready("pod/caller", "pod/stranger")
	for _, pod := range slices.Concat(p.pods("api"), p.pods("web"), p.pods("stranger")) {
		if n := len(pod.Status.InitContainerStatuses); n != 1 || pod.Spec.InitContainers[0].Name != "mantlet-proxy" {
			t.Errorf("pod %s has %d init containers, want its sidecar", pod.Name, n)
		}
	}
	p.want("denied", "stranger", traffic.Refused, p.direct("api"), p.service("api"), "api.shop.svc.cluster.local:80")
	p.want("admitted", "caller", traffic.Reached, p.direct("api"), p.service("api"), "api.shop.svc.cluster.local:80")
	if a := p.try("caller", p.service("api"))[0]; !strings.HasPrefix(a.Host, "api-") {
		t.Errorf("who answered: %+v, want a pod of api", a)
	}
	p.inForce("api-from-web")
	p.want("denied, and in force everywhere", "stranger", traffic.Refused, p.direct("api"), p.service("api"))

	// These pods' tokens were checked by the API server's keys, before it was asked about them.
	log, err := w.Cluster.Kubectl(t.Context(), "", "-n", "mantlet-system", "logs", "--tail=-1", "-l", "app.kubernetes.io/name=mantlet")
	if err != nil || !strings.Contains(log, "agents are served") || strings.Contains(log, "keys for tokens cannot be fetched") {
		t.Errorf("the control plane's log: %v\n%s", err, log)
	}

	if o, err := w.Mantlet(t.Context(), "status", "-n", "shop"); err != nil || o.Code != 0 || !strings.Contains(o.Out, "api-from-web") {
		t.Errorf("status: exit code %d, %v\n%s", o.Code, err, o.Out)
	}
	s, err := w.Status(t.Context())
	if err != nil {
		t.Log(err) // of other tests' pods, which come and go
	}
	s = s.In("shop")
	policy, ok := s.Policy("shop/api-from-web")
	if !ok || policy.State != status.InForce || policy.Pods != 2 || policy.InForce != 2 {
		t.Errorf("status of the policy: %+v", policy)
	}
	if len(s.Replicas) != 2 || s.Heard() != 2 {
		t.Errorf("replicas: %+v, want 2 that answer", s.Replicas)
	}
	if len(s.Sidecars) != 6 || len(s.Namespaces) != 1 || s.Namespaces[0].InForce != 6 {
		t.Errorf("sidecars %+v, namespaces %+v: want 6, all in force", s.Sidecars, s.Namespaces)
	}
	if o, err := w.Mantlet(t.Context(), "status", "--wait", "shop/nobody"); err == nil || o.Code != 2 || !strings.Contains(o.Err, "not found") {
		t.Errorf("status --wait for a policy that is not there: exit code %d, %q, want 2", o.Code, o.Err)
	}
}

// A policy in a namespace without sidecars is in force nowhere, and status does not pretend.
func TestStatusTellsOfPodsWithoutSidecar(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "bare", "mantlet.dev/inject=disabled")
	p.apply(client("db", ""), admit("db", "web"))
	p.ready("pod/db")
	o, err := w.Mantlet(t.Context(), "status", "--wait", "bare/db", "--timeout", "6s")
	if err == nil || o.Code != 1 || !strings.Contains(o.Err, "no sidecar") {
		t.Errorf("exit code %d, %v, want 1 and why: %q", o.Code, err, o.Err)
	}
}
