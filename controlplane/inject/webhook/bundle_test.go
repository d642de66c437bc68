package webhook

import (
	"bytes"
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
)

// The roots are written into both configurations, again when they change, and again when somebody else writes.
func TestBundle(t *testing.T) {
	const name = "mantlet"
	client := fake.NewClientset()
	api := client.AdmissionregistrationV1()
	var roots atomic.Pointer[[]byte]
	put := func(s string) { b := []byte(s); roots.Store(&b) }
	put("one")
	b := &Bundle{
		Name: name, Mutating: api.MutatingWebhookConfigurations(), Validating: api.ValidatingWebhookConfigurations(),
		Roots: func() ([]byte, error) { return *roots.Load(), nil }, Logger: slog.New(slog.DiscardHandler), pause: time.Millisecond, resync: 20 * time.Millisecond,
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()

	// They come after us, as in an installation.
	clientConfig := admissionregistrationv1.WebhookClientConfig{Service: &admissionregistrationv1.ServiceReference{Name: name, Namespace: "mantlet-system"}}
	m := &admissionregistrationv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name},
		Webhooks: []admissionregistrationv1.MutatingWebhook{{Name: "a.mantlet.dev", ClientConfig: clientConfig}, {Name: "b.mantlet.dev", ClientConfig: clientConfig}}}
	v := &admissionregistrationv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{Name: "c.mantlet.dev", ClientConfig: clientConfig}}}
	mw, err := b.Mutating.Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer mw.Stop()
	vw, err := b.Validating.Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer vw.Stop()
	if _, err := api.MutatingWebhookConfigurations().Create(ctx, m, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := api.ValidatingWebhookConfigurations().Create(ctx, v, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	await := func(want string) {
		t.Helper()
		awaitEvent(t, mw, func(e watch.Event) bool {
			o := e.Object.(*admissionregistrationv1.MutatingWebhookConfiguration)
			return bytes.Equal(o.Webhooks[0].ClientConfig.CABundle, []byte(want)) && bytes.Equal(o.Webhooks[1].ClientConfig.CABundle, []byte(want))
		})
		awaitEvent(t, vw, func(e watch.Event) bool {
			return bytes.Equal(e.Object.(*admissionregistrationv1.ValidatingWebhookConfiguration).Webhooks[0].ClientConfig.CABundle, []byte(want))
		})
	}
	await("one")
	put("two")
	await("two")
	if _, err := api.MutatingWebhookConfigurations().Update(ctx, m, metav1.UpdateOptions{}); err != nil { // an upgrade, without roots
		t.Fatal(err)
	}
	if _, err := api.ValidatingWebhookConfigurations().Update(ctx, v, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	await("two")
}

func awaitEvent(t *testing.T, w watch.Interface, fits func(watch.Event) bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		select {
		case e, ok := <-w.ResultChan():
			if !ok {
				t.Fatal("the watch has ended")
			}
			if fits(e) {
				return
			}
		case <-deadline:
			t.Fatal("not within 10 s")
		}
	}
}
