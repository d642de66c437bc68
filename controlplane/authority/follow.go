package authority

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"github.com/mantlet/mantlet/identity/ca"
)

// ErrParted is wrapped by Follow's error where another replica has made another root: this one has to end, and takes the Secret's when it starts again.
var ErrParted = errors.New("another root")

// Follow puts in force what the Secret comes to hold, until ctx ends (nil): the steps of a rotation (ca.Rotation), whoever writes them. What would part
// workloads from each other is refused and logged. A Secret that is deleted is created again with what is in force; one that somebody else has created
// with another root is an error ([ErrParted]), as replicas with different roots would part workloads for good. changed is told of the authority's bundle
// after each step.
func (s Secret) Follow(ctx context.Context, authority *ca.CA, changed func()) error {
	ctx, stop := context.WithCancel(ctx)
	factory := informers.NewSharedInformerFactoryWithOptions(s.Client, 0, informers.WithNamespace(s.Name.Namespace),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, s.Name.Name).String()
		}))
	defer factory.Shutdown()
	defer stop()
	f := &follower{Secret: s, authority: authority, changed: changed, parted: make(chan error, 1)}
	take := func(o any) {
		if secret, ok := o.(*corev1.Secret); ok {
			f.take(secret)
		}
	}
	_, err := factory.Core().V1().Secrets().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    take,
		UpdateFunc: func(_, o any) { take(o) },
		DeleteFunc: func(any) { f.restore(ctx) },
	})
	if err != nil {
		return err
	}
	factory.StartWithContext(ctx)
	select {
	case <-ctx.Done():
		return nil
	case err := <-f.parted:
		return err
	}
}

// follower is used by one goroutine, that of the informer's events.
type follower struct {
	Secret
	authority *ca.CA
	changed   func()
	object    types.UID // of the Secret that the authority is that of; "": none was seen yet
	parted    chan error
}

func (f *follower) take(secret *corev1.Secret) {
	m := material(secret)
	is, err := f.authority.Material()
	if err == nil && same(is, m) {
		f.object = secret.UID
		return
	}
	err = f.authority.Replace(m)
	switch {
	case err == nil:
		f.object = secret.UID
		f.Log.Info("the secret with the root has changed, and is in force", "secret", f.Name)
		f.changed()
	case errors.Is(err, ca.ErrParts) && f.object != secret.UID:
		// Nobody edited it: it was deleted, and made by a replica that found none.
		select {
		case f.parted <- fmt.Errorf("secret %s: %w: it was deleted, and another replica has made a new one; this replica ends, to start again with that root: %w", f.Name, ErrParted, err):
		default: // said already
		}
	default:
		f.Log.Error("the secret with the root has changed, and what it holds now is not used; mend it: a replica that starts now would use it", "secret", f.Name, "error", err)
	}
}

func same(a, b ca.Material) bool {
	return subtle.ConstantTimeCompare(a.Key, b.Key) == 1 && string(a.Chain) == string(b.Chain) && string(a.Roots) == string(b.Roots)
}

// restorePatience bounds the answer of the API server.
const restorePatience = 10 * time.Second

func (f *follower) restore(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, restorePatience)
	defer cancel()
	switch err := f.create(ctx, f.authority); {
	case err == nil:
		f.Log.Warn("the secret with the root was deleted; it was made again, with the same root", "secret", f.Name)
	case apierrors.IsAlreadyExists(err): // what it holds comes as an event
		f.Log.Warn("the secret with the root was deleted, and another replica has made it again", "secret", f.Name)
	default:
		f.Log.Error("the secret with the root was deleted, and cannot be created again: a replica that starts now would make another root", "secret", f.Name, "error", err)
	}
}
