package authority

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/apitest"
)

// late holds what creates Secrets back until it is let go, as a network may.
type late struct {
	http.RoundTripper
	arrived, release chan struct{}
}

func (l *late) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/secrets") {
		l.arrived <- struct{}{}
		<-l.release
	}
	return l.RoundTripper.RoundTrip(r)
}

// logged is a log that several goroutines write.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// TestParted: a replica that has just started makes another root after the Secret was deleted, before one that runs has made it again. The one that
// runs says so and ends, and starts again with the other's root. An edit that would part workloads ends nobody.
func TestParted(t *testing.T) {
	s := apitest.Start(t, cluster.APIServerOptions{})
	api, c := apitest.Config(t, s), apitest.Client(t, s)
	gate := &late{arrived: make(chan struct{}), release: make(chan struct{})}
	slow := rest.CopyConfig(api)
	slow.Wrap(func(rt http.RoundTripper) http.RoundTripper { gate.RoundTripper = rt; return gate })
	held, err := kubernetes.NewForConfig(slow)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: names.SystemNamespace}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	var says logged
	cfg := ca.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("td.example")}
	named := types.NamespacedName{Namespace: names.SystemNamespace, Name: names.CASecret}
	fresh := Secret{Client: c, Name: named, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	running := Secret{Client: held, Name: named, Log: slog.New(slog.NewTextHandler(&says, nil))}
	if _, err := fresh.Open(t.Context(), cfg); err != nil { // so that there is one
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	one, err := running.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	// run is what a replica does with its root.
	run := func(secret Secret, authority *ca.CA) <-chan error {
		ctx, stop := context.WithCancel(ctx)
		b, err := NewBundle(c, func() ([]byte, error) { return authority.Bundle().Marshal() }, secret.Log)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		bundled := make(chan error, 1)
		go func() { bundled <- b.Run(ctx) }()
		go func() {
			err := secret.Follow(ctx, authority, b.Changed)
			stop()
			ended <- errors.Join(err, <-bundled)
		}()
		return ended
	}
	published := func(want *ca.CA) func() bool {
		pem, err := want.Bundle().Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return func() bool {
			m, err := c.CoreV1().ConfigMaps("default").Get(t.Context(), names.RootConfigMap, metav1.GetOptions{})
			return err == nil && m.Data[names.RootKey] == string(pem)
		}
	}
	secrets := c.CoreV1().Secrets(names.SystemNamespace)
	ended := run(running, one)
	await(t, "the first root is published", published(one))

	// Somebody edits the Secret, and takes it back.
	is, err := secrets.Get(t.Context(), names.CASecret, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	other, err := ca.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, of := range []*ca.CA{other, one} {
		m, err := of.Material()
		if err != nil {
			t.Fatal(err)
		}
		is.Data = map[string][]byte{corev1.TLSPrivateKeyKey: m.Key, corev1.TLSCertKey: m.Chain, rootsKey: m.Roots}
		if is, err = secrets.Update(t.Context(), is, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		await(t, "the edit is refused", func() bool { return strings.Contains(says.String(), "what it holds now is not used") })
	}

	if err := secrets.Delete(t.Context(), names.CASecret, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	<-gate.arrived // it is about to make it again
	two, err := fresh.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if two.Bundle().Equal(one.Bundle()) {
		t.Fatal("the replica that has just started made no root of its own")
	}
	second := run(fresh, two)
	close(gate.release)
	if err := <-ended; !errors.Is(err, ErrParted) || !strings.Contains(err.Error(), "secret mantlet-system/mantlet-ca: another root: it was deleted, and another replica has made a new one") {
		t.Fatalf("the one that ran ends with %v", err)
	}
	if text := says.String(); strings.Contains(text, "with the same root") || !strings.Contains(text, "another replica has made it again") {
		t.Errorf("the one that ran says:\n%s", text)
	}
	again, err := running.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !again.Bundle().Equal(two.Bundle()) {
		t.Error("the one that starts again has another root still")
	}
	third := run(running, again)
	await(t, "the second root is published", published(two))
	// Of two that have one root nobody writes over the other: it is not written again.
	m, err := c.CoreV1().ConfigMaps("default").Get(t.Context(), names.RootConfigMap, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "later"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	await(t, "a namespace that came", func() bool {
		_, err := c.CoreV1().ConfigMaps("later").Get(t.Context(), names.RootConfigMap, metav1.GetOptions{})
		return err == nil
	})
	if now, err := c.CoreV1().ConfigMaps("default").Get(t.Context(), names.RootConfigMap, metav1.GetOptions{}); err != nil || now.ResourceVersion != m.ResourceVersion {
		t.Errorf("the bundle was written again: %v", err)
	}
	cancel()
	for _, end := range []<-chan error{second, third} {
		if err := <-end; err != nil {
			t.Error(err)
		}
	}
}
