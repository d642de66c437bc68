package retired

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// Between two attempts to write.
const (
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
)

// Run keeps the Secret and what is known here together until ctx ends (nil). recall is told of all that is known, whenever there is something new. Nothing
// of it runs when it returns.
func (r *Records) Run(ctx context.Context, recall func([]policy.Retirement, []policy.Binding) error) error {
	ctx, stop := context.WithCancel(ctx)
	factory := informers.NewSharedInformerFactoryWithOptions(r.cfg.Watch, 0, informers.WithNamespace(r.cfg.Name.Namespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, r.cfg.Name.Name).String()
		}))
	defer factory.Shutdown()
	defer stop()
	secrets := factory.Core().V1().Secrets()
	_, err := secrets.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { r.poke() }, UpdateFunc: func(any, any) { r.poke() }, DeleteFunc: func(any) { r.poke() },
	})
	if err != nil {
		return err
	}
	factory.StartWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), secrets.Informer().HasSynced) {
		return nil // asked to end
	}
	retry := firstRetry
	for {
		var is *corev1.Secret // nil where the lister has none
		if is, err = secrets.Lister().Secrets(r.cfg.Name.Namespace).Get(r.cfg.Name.Name); err != nil {
			is = nil
		}
		news, err := r.reconcile(ctx, is)
		wait := r.untilExpiry()
		if err == nil {
			retry = firstRetry
		} else if ctx.Err() == nil {
			r.cfg.Log.Error("what is retired cannot be put on record: it is in force here, pods that it concerns get no new certificate, and whoever starts now does not know of it",
				"error", err, "retry_in", retry)
			wait, retry = retry, min(2*retry, lastRetry)
		}
		if news {
			if err := recall(r.Known()); err != nil {
				r.cfg.Log.Error("what others have retired has not been taken over in full", "error", err)
			}
		}
		due := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			due.Stop()
			return nil
		case <-r.wake:
		case <-due.C:
		}
		due.Stop()
	}
}

// untilExpiry is how long it takes until something on record has ended, at most an hour.
func (r *Records) untilExpiry() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.cfg.Now()
	next := r.known.expire(now.Add(-r.lag))
	if next.IsZero() {
		return time.Hour
	}
	return min(time.Hour, max(0, next.Add(r.lag).Sub(now)))
}
