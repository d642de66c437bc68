package authority

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/apitest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestAuthority: replicas that start at once share one root, which survives them; the steps of a rotation reach each of them, and its
// bundle every namespace; what somebody breaks is mended.
func TestAuthority(t *testing.T) {
	c := apitest.Client(t, apitest.Start(t, cluster.APIServerOptions{}))
	namespace := func(name string) {
		t.Helper()
		if _, err := c.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	namespace(names.SystemNamespace)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	secret := Secret{Client: c, Name: types.NamespacedName{Namespace: names.SystemNamespace, Name: names.CASecret}, Log: log}
	cfg := ca.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("td.example")}

	const replicas = 8
	var roots [replicas]*ca.CA
	var g sync.WaitGroup
	for i := range roots {
		g.Go(func() {
			var err error
			if roots[i], err = secret.Open(t.Context(), cfg); err != nil {
				t.Error(err)
			}
		})
	}
	g.Wait()
	if t.Failed() {
		return
	}
	for _, r := range roots[1:] {
		if !r.Bundle().Equal(roots[0].Bundle()) {
			t.Fatal("replicas that start at once have different roots")
		}
	}

	ctx, cancel := context.WithCancel(context.Background())
	defer g.Wait()
	defer cancel()
	for _, r := range roots[:2] {
		b, err := NewBundle(c, func() ([]byte, error) { return r.Bundle().Marshal() }, log)
		if err != nil {
			t.Fatal(err)
		}
		g.Go(func() {
			if err := b.Run(ctx); err != nil {
				t.Error(err)
			}
		})
		g.Go(func() {
			if err := secret.Follow(ctx, r, b.Changed); err != nil {
				t.Error(err)
			}
		})
	}
	published := func(what, namespace string, want *ca.CA) {
		t.Helper()
		pem, err := want.Bundle().Marshal()
		if err != nil {
			t.Fatal(err)
		}
		await(t, what, func() bool {
			m, err := c.CoreV1().ConfigMaps(namespace).Get(t.Context(), names.RootConfigMap, metav1.GetOptions{})
			return err == nil && m.Data[names.RootKey] == string(pem)
		})
	}
	published("a namespace that was there", "default", roots[2])
	namespace("later")
	published("a namespace that came", "later", roots[2])
	maps := c.CoreV1().ConfigMaps("later")
	m, err := maps.Get(t.Context(), names.RootConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m.Data[names.RootKey] = "nonsense"
	if _, err := maps.Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	published("one that somebody changed", "later", roots[2])
	m, err = maps.Get(t.Context(), names.RootConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	m.Data[names.RootKey], m.Immutable = "nonsense", new(true)
	if _, err := maps.Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	published("one that somebody changed for good", "later", roots[2])
	if err := maps.Delete(t.Context(), names.RootConfigMap, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	published("one that somebody deleted", "later", roots[2])

	// The first step of a rotation, and the last, which would leave one out.
	next, err := ca.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	rotation := ca.Rotation{}
	if rotation.Old, err = roots[2].Material(); err != nil {
		t.Fatal(err)
	}
	if rotation.New, err = next.Material(); err != nil {
		t.Fatal(err)
	}
	set := func(m ca.Material) {
		t.Helper()
		is, err := c.CoreV1().Secrets(names.SystemNamespace).Get(t.Context(), names.CASecret, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		is.Data = map[string][]byte{corev1.TLSPrivateKeyKey: m.Key, corev1.TLSCertKey: m.Chain, rootsKey: m.Roots}
		if _, err := c.CoreV1().Secrets(names.SystemNamespace).Update(t.Context(), is, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	set(rotation.Prepared())
	prepared, err := ca.Load(cfg, rotation.Prepared())
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range roots[:2] {
		await(t, "replica "+string(rune('0'+i))+" trusts both roots", func() bool { return r.Bundle().Equal(prepared.Bundle()) })
	}
	published("both roots", "later", prepared)

	// A Secret that is deleted is there again, and it is the same.
	if err := c.CoreV1().Secrets(names.SystemNamespace).Delete(t.Context(), names.CASecret, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	await(t, "the deleted secret", func() bool {
		r, err := c.CoreV1().Secrets(names.SystemNamespace).Get(t.Context(), names.CASecret, metav1.GetOptions{})
		return err == nil && same(material(r), rotation.Prepared())
	})

	// What is in the Secret and is no authority is an error, and stays.
	cancel()
	g.Wait()
	set(ca.Material{Key: []byte("x"), Chain: []byte("y"), Roots: []byte("z")})
	if _, err := secret.Open(t.Context(), cfg); err == nil {
		t.Error("nonsense is opened as an authority")
	} else {
		t.Log(err)
	}
}

// await waits until it holds: what an API server holds can be asked again only.
func await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for end := time.Now().Add(time.Minute); !holds(); <-look.C {
		if time.Now().After(end) {
			t.Fatalf("after a minute not yet: %s", what)
		}
	}
}
