package webhook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"
)

// MutatingConfigurations is the part that is used of client-go's MutatingWebhookConfigurationInterface.
type MutatingConfigurations interface {
	Get(ctx context.Context, name string, opts metav1.GetOptions) (*admissionregistrationv1.MutatingWebhookConfiguration, error)
	List(ctx context.Context, opts metav1.ListOptions) (*admissionregistrationv1.MutatingWebhookConfigurationList, error)
	Update(ctx context.Context, o *admissionregistrationv1.MutatingWebhookConfiguration, opts metav1.UpdateOptions) (*admissionregistrationv1.MutatingWebhookConfiguration, error)
	Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error)
}

// ValidatingConfigurations is the part that is used of client-go's ValidatingWebhookConfigurationInterface.
type ValidatingConfigurations interface {
	Get(ctx context.Context, name string, opts metav1.GetOptions) (*admissionregistrationv1.ValidatingWebhookConfiguration, error)
	List(ctx context.Context, opts metav1.ListOptions) (*admissionregistrationv1.ValidatingWebhookConfigurationList, error)
	Update(ctx context.Context, o *admissionregistrationv1.ValidatingWebhookConfiguration, opts metav1.UpdateOptions) (*admissionregistrationv1.ValidatingWebhookConfiguration, error)
	Watch(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error)
}

// Bundle keeps the roots by which the API server knows the webhooks in their configurations: when the roots change, and when somebody
// else writes the configurations, as an upgrade does. Where several replicas run it they must have the same roots, else each takes away
// what the other has written, once a second. All fields are required.
type Bundle struct {
	Name       string // of both configurations
	Mutating   MutatingConfigurations
	Validating ValidatingConfigurations
	Roots      func() ([]byte, error) // every trusted root, PEM: ca.Material.Roots
	Logger     *slog.Logger

	pause, resync time.Duration // for tests; 0: the constants below
}

const (
	bundlePause  = time.Second // between two looks at a configuration
	bundleResync = time.Minute // how late a change of the roots may be written: while both are trusted there is time
)

// Run keeps the roots until ctx ends. Configurations that are not there yet are waited for.
func (b *Bundle) Run(ctx context.Context) error {
	if b.Name == "" || b.Mutating == nil || b.Validating == nil || b.Roots == nil || b.Logger == nil {
		return errors.New("webhook bundle: all fields must be set")
	}
	if b.pause == 0 {
		b.pause = bundlePause
	}
	if b.resync == 0 {
		b.resync = bundleResync
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		b.keep(ctx, "MutatingWebhookConfiguration", b.mutating, fromNow(b.Mutating.List, b.Mutating.Watch))
	}()
	b.keep(ctx, "ValidatingWebhookConfiguration", b.validating, fromNow(b.Validating.List, b.Validating.Watch))
	<-done
	return nil
}

// opener opens a watch of what changes from now on.
type opener func(context.Context, metav1.ListOptions) (watch.Interface, error)

// fromNow begins a watch at a list's version: one without a version first tells of what is there already.
func fromNow[L metav1.ListInterface](list func(context.Context, metav1.ListOptions) (L, error), open opener) opener {
	return func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
		is, err := list(ctx, o)
		if err != nil {
			return nil, err
		}
		o.ResourceVersion = is.GetResourceVersion()
		return open(ctx, o)
	}
}

// keep writes one configuration whenever it may have to be.
func (b *Bundle) keep(ctx context.Context, kind string, write func(context.Context, []byte) (bool, error), open opener) {
	last := ""
	for ctx.Err() == nil {
		w, err := open(ctx, metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", b.Name).String()})
		if err == nil { // watched before it is read: no change in between is missed
			err = b.once(ctx, kind, write)
		}
		text := ""
		if err != nil && ctx.Err() == nil {
			if text = err.Error(); text != last {
				b.Logger.Warn("webhook: the API server may not know our certificate", "kind", kind, "name", b.Name, "error", err)
			}
		}
		last = text
		b.wait(ctx, w)
	}
}

// wait returns when the configuration may have to be written again, and not before the pause is over.
func (b *Bundle) wait(ctx context.Context, w watch.Interface) {
	if w != nil {
		defer w.Stop()
	}
	pause, resync := time.NewTimer(b.pause), time.NewTimer(b.resync)
	defer pause.Stop()
	defer resync.Stop()
	paused, dirty := true, w == nil
	for paused || !dirty {
		var events <-chan watch.Event
		if w != nil && !dirty {
			events = w.ResultChan()
		}
		select {
		case <-ctx.Done():
			return
		case <-pause.C:
			paused = false
		case <-resync.C:
			dirty = true
		case <-events: // also when the watch has ended
			dirty = true
		}
	}
}

// once writes the roots where they are not.
func (b *Bundle) once(ctx context.Context, kind string, write func(context.Context, []byte) (bool, error)) error {
	roots, err := b.Roots()
	if err != nil {
		return err
	}
	wrote, err := write(ctx, roots)
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("it does not exist; `mantlet install` makes it: %w", err)
	case apierrors.IsConflict(err): // the watch tells of who was faster
		return nil
	case err != nil:
		return err
	}
	if wrote {
		b.Logger.Info("webhook: wrote the roots", "kind", kind, "name", b.Name)
	}
	return nil
}

func (b *Bundle) mutating(ctx context.Context, roots []byte) (bool, error) {
	o, err := b.Mutating.Get(ctx, b.Name, metav1.GetOptions{})
	if err != nil {
		return false, err
	}
	o = o.DeepCopy()
	changed := false
	for i := range o.Webhooks {
		changed = set(&o.Webhooks[i].ClientConfig, roots) || changed
	}
	if changed {
		_, err = b.Mutating.Update(ctx, o, metav1.UpdateOptions{})
	}
	return changed, err
}

func (b *Bundle) validating(ctx context.Context, roots []byte) (bool, error) {
	o, err := b.Validating.Get(ctx, b.Name, metav1.GetOptions{})
	if err != nil {
		return false, err
	}
	o = o.DeepCopy()
	changed := false
	for i := range o.Webhooks {
		changed = set(&o.Webhooks[i].ClientConfig, roots) || changed
	}
	if changed {
		_, err = b.Validating.Update(ctx, o, metav1.UpdateOptions{})
	}
	return changed, err
}

func set(c *admissionregistrationv1.WebhookClientConfig, roots []byte) bool {
	if bytes.Equal(c.CABundle, roots) {
		return false
	}
	c.CABundle = roots
	return true
}
