package admission

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/settings"
	"github.com/mantlet/mantlet/identity/ca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func read(t *testing.T) *settings.Settings {
	t.Helper()
	s, err := settings.Read([]byte("namespace: shield\ntrustDomain: mantlet.local\nimage: registry.example/mantlet@sha256:01"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func authority(t *testing.T, domain string) *ca.CA {
	t.Helper()
	a, err := ca.New(ca.Config{TrustDomain: spiffeid.RequireTrustDomainFromString(domain)})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// What is written into the configurations is what makes the API server trust the webhooks, by the name of the Service.
func TestRun(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	hook := admissionregistrationv1.MutatingWebhook{Name: "a.mantlet.dev"}
	client := fake.NewClientset(&admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: names.WebhookConfiguration}, Webhooks: []admissionregistrationv1.MutatingWebhook{hook}})
	w, err := client.AdmissionregistrationV1().MutatingWebhookConfigurations().Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	l := listen(t)
	done := make(chan error, 1)
	go func() {
		done <- Run(ctx, Config{Settings: read(t), Client: client, Authority: authority(t, "mantlet.local"), Listener: l, Log: slog.New(slog.DiscardHandler)})
	}()
	var roots []byte
	for deadline := time.After(30 * time.Second); len(roots) == 0; {
		select {
		case e := <-w.ResultChan():
			roots = e.Object.(*admissionregistrationv1.MutatingWebhookConfiguration).Webhooks[0].ClientConfig.CABundle
		case err := <-done:
			t.Fatal(err)
		case <-deadline:
			t.Fatal("no roots within 30 s")
		}
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(roots)
	conn, err := (&tls.Dialer{Config: &tls.Config{RootCAs: pool, ServerName: "mantlet.shield.svc"}}).DialContext(ctx, "tcp", l.Addr().String())
	if err != nil {
		t.Error(err)
	} else {
		_ = conn.Close()
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestOtherDomain(t *testing.T) {
	if err := Run(t.Context(), Config{Settings: read(t), Client: fake.NewClientset(), Authority: authority(t, "other.local"), Listener: listen(t), Log: slog.New(slog.DiscardHandler)}); err == nil {
		t.Error("sidecars would be told another trust domain than the authority's")
	}
}
