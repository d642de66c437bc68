package controlplane

import (
	"net/netip"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/xds/server"
)

// TestWhoMattersIsCompiled has a change compile those subjects alone on which somebody's resources rest; a pod without a sidecar is one of them
// from when a sidecar asks for it.
func TestWhoMattersIsCompiled(t *testing.T) {
	cp, err := New(Config{Policy: policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"),
		PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}}, server.Config{Authenticator: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	w := &town{cp, t, 0}
	plain := w.pod("legacy")
	plain.Annotations = nil
	if err := cp.Load(&policy.Objects{Pods: []*corev1.Pod{plain}}); err != nil {
		t.Fatal(err)
	}
	key := w.index.Subject(plain.Namespace + "/" + plain.Name).Key
	narrow := func(name string) *networkingv1.NetworkPolicy {
		return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: plain.Namespace, Name: name},
			Spec: networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "legacy"}}}}
	}
	// touched says of a change whether it compiled something, and what on-demand names it made stale.
	touched := func(change func()) (compiled int, stale map[string]bool) {
		before := w.index.Compiles()
		change()
		stale = map[string]bool{}
		if err := w.publishChanged(key, stale); err != nil {
			t.Fatal(err)
		}
		return w.index.Compiles() - before, stale
	}
	if n, stale := touched(func() { w.apply(narrow("first")) }); n != 0 || len(stale) > 0 || w.hashes[key] != (policy.Hashes{}) {
		t.Errorf("nobody uses it: compiled %d times, stale %v, hashes %q", n, stale, w.hashes[key])
	}
	client := server.Client(w.scale("api"))
	name := "od|" + plain.Status.PodIPs[0].IP + ":80"
	closed, ok := w.Resolve(client, name)
	if !ok {
		t.Fatalf("%s is unknown", name)
	}
	apply := func() {
		np := narrow("second")
		np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{}}
		if _, err := w.index.Apply(np); err != nil {
			t.Fatal(err)
		}
		w.changes++
	}
	if n, stale := touched(apply); n == 0 || !stale[name] || w.hashes[key] == (policy.Hashes{}) {
		t.Errorf("a sidecar uses it: compiled %d times, stale %v, hashes %q", n, stale, w.hashes[key])
	}
	if open, ok := w.Resolve(client, name); !ok || open.Version == closed.Version {
		t.Errorf("the destination is answered as before (%t)", ok)
	}
	w.apply(narrow("third"))
	if err := w.Delete(plain); err != nil {
		t.Fatal(err)
	}
	if _, kept := w.hashes[key]; kept {
		t.Error("what is known of a subject is kept when it is gone")
	}
}
