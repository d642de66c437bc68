package webhook

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/mantlet/mantlet/controlplane/inject/names"
)

// counted counts watches.
type counted struct {
	ValidatingConfigurations
	watches atomic.Int32
}

func (c *counted) Watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	c.watches.Add(1)
	return c.ValidatingConfigurations.Watch(ctx, o)
}

// testBundleRests: where the roots are written nothing more is asked until somebody writes. A real API server, unlike the fake one, begins a watch that
// has no version with what is there.
func testBundleRests(t *testing.T, w *world) {
	api := w.control().AdmissionregistrationV1()
	c := &counted{ValidatingConfigurations: api.ValidatingWebhookConfigurations()}
	var roots []byte
	w.await("the roots", func() error {
		o, err := c.Get(t.Context(), names.WebhookConfiguration, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if roots = o.Webhooks[0].ClientConfig.CABundle; len(roots) == 0 {
			return errors.New("none are written yet")
		}
		return nil
	})
	b := &Bundle{Name: names.WebhookConfiguration, Mutating: api.MutatingWebhookConfigurations(), Validating: c,
		Roots: func() ([]byte, error) { return roots, nil }, Logger: slog.New(slog.DiscardHandler), pause: 10 * time.Millisecond, resync: time.Hour}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond) // fifty looks, if each brought on another
	defer cancel()
	if err := b.Run(ctx); err != nil {
		t.Error(err)
	}
	if n := c.watches.Load(); n == 0 || n > 3 { // others' last writes may come in between
		t.Errorf("%d watches were opened while nobody wrote", n)
	}
}
