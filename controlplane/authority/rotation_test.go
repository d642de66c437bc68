package authority

import (
	"encoding/pem"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/apitest"
)

// TestSteps: each step is read back from the Secret, nobody writes over what somebody else has written, and what cannot be gone on with is said.
func TestSteps(t *testing.T) {
	c := apitest.Client(t, apitest.Start(t, cluster.APIServerOptions{}))
	ctx := t.Context()
	if _, err := c.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: names.SystemNamespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	secret := Secret{Client: c, Name: types.NamespacedName{Namespace: names.SystemNamespace, Name: names.CASecret}, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	cfg := ca.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("td.example")}
	if _, err := secret.State(ctx, cfg); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("without a secret: %v", err)
	}
	replica, err := secret.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	state := func() State {
		t.Helper()
		st, err := secret.State(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	edit := func(f func(*corev1.Secret)) {
		t.Helper()
		is, err := c.CoreV1().Secrets(names.SystemNamespace).Get(ctx, names.CASecret, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		f(is)
		if _, err := c.CoreV1().Secrets(names.SystemNamespace).Update(ctx, is, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	old := replica.Bundle().X509Authorities()[0]
	now := time.Now()
	for i, want := range []struct {
		step     Step
		roots    int
		oldSigns bool
	}{{Settled, 1, true}, {Prepared, 2, true}, {Activated, 2, false}, {Settled, 1, false}} {
		st := state()
		if st.Step != want.step || len(st.Authority.Bundle().X509Authorities()) != want.roots {
			t.Fatalf("after %d steps: %q with %d roots", i, st.Step, len(st.Authority.Bundle().X509Authorities()))
		}
		m, err := st.Authority.Material()
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 { // as a replica does
			if err := replica.Replace(m); err != nil {
				t.Fatalf("after %d steps a replica refuses it: %v", i, err)
			}
			if !st.Since.Equal(now.Truncate(time.Second)) {
				t.Errorf("after %d steps: since %s, not %s", i, st.Since, now)
			}
		}
		if replica.Fingerprint() != st.Authority.Fingerprint() {
			t.Errorf("after %d steps replica and secret differ", i)
		}
		if signs := strings.Contains(string(m.Chain), string(encodedOf(t, old.Raw))); signs != want.oldSigns {
			t.Errorf("after %d steps the old root signs: %t", i, signs)
		}
		if i == 3 {
			break
		}
		late := state()
		if _, err := secret.Advance(ctx, st, cfg, now); err != nil {
			t.Fatal(err)
		}
		if _, err := secret.Advance(ctx, late, cfg, now); !errors.Is(err, ErrMoved) {
			t.Errorf("step %d is written over: %v", i+1, err)
		}
	}

	edit(func(s *corev1.Secret) { s.Annotations[managedBy] = "root" })
	if _, err := secret.Advance(ctx, state(), cfg, now); err == nil || !strings.Contains(err.Error(), "cert-manager keeps it (certificate root)") {
		t.Errorf("one that somebody else keeps: %v", err)
	}
	edit(func(s *corev1.Secret) { delete(s.Annotations, managedBy); s.Data[nextKey] = []byte("x") })
	if _, err := secret.State(ctx, cfg); !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "take next.key, next.crt and next.ca.crt out") {
		t.Errorf("half of a rotation: %v", err)
	}
	edit(func(s *corev1.Secret) { delete(s.Data, nextKey); s.Annotations[steppedAt] = "noon" })
	if _, err := secret.State(ctx, cfg); !errors.Is(err, ErrUnusable) || !strings.Contains(err.Error(), "annotation mantlet.dev/rotation-step") {
		t.Errorf("at no time: %v", err)
	}
}

func encodedOf(t *testing.T, der []byte) []byte {
	t.Helper()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
