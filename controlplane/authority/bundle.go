package authority

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"github.com/mantlet/mantlet/controlplane/inject/names"
)

// Bundle keeps the trust bundle in a ConfigMap (names.RootConfigMap) of every namespace, whether its pods get sidecars or not: a pod may ask for
// one itself, and the ConfigMap has to be there before its sidecar is. It is public, as the certificates in it are.
type Bundle struct {
	client kubernetes.Interface
	pem    func() ([]byte, error)
	log    *slog.Logger
	queue  workqueue.TypedRateLimitingInterface[string] // names of namespaces

	namespaces corelisters.NamespaceLister
	maps       corelisters.ConfigMapLister
	factories  []informers.SharedInformerFactory
}

// mendAfter is how long a ConfigMap may be otherwise than it should. Two replicas between which a step of a rotation has not come round yet
// otherwise would write over each other as fast as they can.
const mendAfter = time.Second

// NewBundle returns a Bundle of what pem returns; the work is done by Run.
func NewBundle(client kubernetes.Interface, pem func() ([]byte, error), log *slog.Logger) (*Bundle, error) {
	all := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(slim))
	own := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(slim), informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, names.RootConfigMap).String()
	}))
	b := &Bundle{client: client, pem: pem, log: log, factories: []informers.SharedInformerFactory{all, own},
		namespaces: all.Core().V1().Namespaces().Lister(), maps: own.Core().V1().ConfigMaps().Lister(),
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[string](100*time.Millisecond, 30*time.Second)),
	}
	for _, w := range []struct {
		informer cache.SharedIndexInformer
		name     func(metav1.Object) string
		after    time.Duration
	}{
		{all.Core().V1().Namespaces().Informer(), metav1.Object.GetName, 0},
		{own.Core().V1().ConfigMaps().Informer(), metav1.Object.GetNamespace, mendAfter},
	} {
		enqueue := func(obj any) {
			if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = last.Obj
			}
			if o, ok := obj.(metav1.Object); ok {
				b.queue.AddAfter(w.name(o), w.after)
			}
		}
		if _, err := w.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: enqueue, UpdateFunc: func(_, o any) { enqueue(o) }, DeleteFunc: enqueue}); err != nil {
			return nil, fmt.Errorf("watch for the trust bundle: %w", err)
		}
	}
	return b, nil
}

// slim keeps of a namespace whether it is about to go, and of a ConfigMap what it holds.
func slim(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: o.Name, ResourceVersion: o.ResourceVersion}, Status: o.Status}, nil
	case *corev1.ConfigMap:
		o.ManagedFields = nil
	}
	return obj, nil
}

// Changed says that the bundle is another one now.
func (b *Bundle) Changed() {
	list, err := b.namespaces.List(labels.Everything())
	if err != nil {
		b.log.Error("the trust bundle is not brought to namespaces", "error", err)
	}
	for _, n := range list {
		b.queue.Add(n.Name)
	}
}

// Behind lists the namespaces, sorted, whose ConfigMap does not hold the bundle yet, as far as is known here.
func (b *Bundle) Behind() (list []string, err error) {
	pem, err := b.pem()
	if err != nil {
		return nil, err
	}
	all, err := b.namespaces.List(labels.Everything())
	if err != nil {
		return nil, err
	}
	for _, ns := range all {
		if ns.Status.Phase == corev1.NamespaceTerminating {
			continue
		}
		if is, err := b.maps.ConfigMaps(ns.Name).Get(names.RootConfigMap); err != nil || is.Data[names.RootKey] != string(pem) {
			list = append(list, ns.Name)
		}
	}
	slices.Sort(list)
	return list, nil
}

// Run keeps the ConfigMaps until ctx ends. Nothing of it runs when it returns.
func (b *Bundle) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer func() {
		stop()
		for _, f := range b.factories {
			f.Shutdown()
		}
	}()
	go func() {
		<-ctx.Done()
		b.queue.ShutDown()
	}()
	for _, f := range b.factories {
		f.StartWithContext(ctx)
	}
	for _, f := range b.factories {
		f.WaitForCacheSyncWithContext(ctx) // before that a ConfigMap seems not to be there that is
	}
	for {
		name, ended := b.queue.Get()
		if ended {
			return nil
		}
		if err := b.bring(ctx, name); err != nil && ctx.Err() == nil {
			b.log.Warn("the trust bundle is not in a namespace; it is tried again", "namespace", name, "error", err)
			b.queue.AddRateLimited(name)
		} else {
			b.queue.Forget(name)
		}
		b.queue.Done(name)
	}
}

// bring makes a namespace's ConfigMap what it should be.
func (b *Bundle) bring(ctx context.Context, namespace string) error {
	ns, err := b.namespaces.Get(namespace)
	if apierrors.IsNotFound(err) || err == nil && ns.Status.Phase == corev1.NamespaceTerminating {
		return nil
	}
	if err != nil {
		return err
	}
	pem, err := b.pem()
	if err != nil {
		return err
	}
	api := b.client.CoreV1().ConfigMaps(namespace)
	is, err := b.maps.ConfigMaps(namespace).Get(names.RootConfigMap)
	switch {
	case apierrors.IsNotFound(err):
		_, err = api.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: names.RootConfigMap, Namespace: namespace},
			Data:       map[string]string{names.RootKey: string(pem)},
		}, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) || apierrors.IsNotFound(err) { // another replica was first, or the namespace went: an event says so
			err = nil
		}
		return err
	case err != nil:
		return err
	case is.Data[names.RootKey] == string(pem) && len(is.Data) == 1:
		return nil
	case is.Immutable != nil && *is.Immutable: // by somebody who was there before us; it is made again once it is seen to be gone
		err := api.Delete(ctx, is.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &is.UID}})
		if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
			return nil
		}
		return err
	}
	next := is.DeepCopy()
	next.Data = map[string]string{names.RootKey: string(pem)}
	if _, err = api.Update(ctx, next, metav1.UpdateOptions{}); apierrors.IsNotFound(err) || apierrors.IsConflict(err) { // as above
		return nil
	}
	return err
}
