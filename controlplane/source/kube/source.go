package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// Target takes over what changes in the cluster; *controlplane.ControlPlane is one. It is called from one goroutine.
type Target interface {
	// Update takes objects over and others out as one change. Its error names those that could not be taken over; the others were.
	Update(applied, deleted []metav1.Object) error
	// Renumber is told when the cluster has other ranges of addresses, with the whole set of objects: those that it has been told of.
	Renumber(pods, services []netip.Prefix, o *policy.Objects) error
}

// Start is called once, when the whole cluster is known, and returns who is told of all that changes from then on.
type Start func(Networks, *policy.Objects) (Target, error)

// Config is what a Source needs. Client and Log are required.
type Config struct {
	Client kubernetes.Interface
	Log    *slog.Logger
	// Networks are ranges that the cluster uses, whatever its nodes and ServiceCIDRs say. Without Pods that is told by the nodes' podCIDRs
	// alone, and each node more or less renumbers the cluster. With Services the API's ServiceCIDRs are not asked for; API
	// servers before 1.33 have none.
	Networks Networks
	// NodeAddrs are addresses from which every node may speak to its pods, beside its own.
	NodeAddrs []netip.Addr
}

// Source watches a cluster.
type Source struct {
	cfg   Config
	queue *queue
	world *world
}

// New returns a Source; the work is done by Run.
func New(cfg Config) *Source {
	return &Source{cfg: cfg, queue: newQueue(), world: newWorld(cfg.Networks, cfg.NodeAddrs)}
}

// Run watches the cluster until ctx ends, and then returns nil. It calls start once every kind has been listed, and tells the Target of what
// changes afterwards. An error is one of start. An API server that is away, or that forbids something, is logged and asked again: the Target then
// keeps what it has, and before the start it has nothing. When Run returns nothing of it runs any more. It is called once.
func (s *Source) Run(ctx context.Context, start Start) error {
	ctx, stop := context.WithCancel(ctx)
	factory := informers.NewSharedInformerFactoryWithOptions(s.cfg.Client, 0, informers.WithTransform(slim))
	defer factory.Shutdown() // waits for what stop ends
	defer stop()
	synced, err := s.watch(factory)
	if err != nil {
		return err
	}
	began := time.Now()
	factory.StartWithContext(ctx)
	if !cache.WaitFor(ctx, "", synced...) {
		return nil // asked to end
	}
	s.world.take(s.queue.take())
	networks, objects := s.world.networks(), s.world.all()
	s.cfg.Log.Info("the cluster is known", "pods", len(objects.Pods), "nodes", len(objects.Nodes), "policies", len(objects.NetworkPolicies),
		"pod_network", networks.Pods, "service_network", networks.Services, "took", time.Since(began).Round(time.Millisecond))
	target, err := start(networks, objects)
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.queue.filled:
			networks = s.deliver(target, networks)
		}
	}
}

// deliver takes over what the queue holds, and returns what the cluster's ranges are then.
func (s *Source) deliver(target Target, before Networks) Networks {
	applied, deleted := s.world.take(s.queue.take())
	if len(applied)+len(deleted) > 0 {
		if err := target.Update(applied, deleted); err != nil {
			s.cfg.Log.Error("a change of the cluster has not been taken over in full", "error", err)
		}
	}
	if !s.world.ranged {
		return before
	}
	s.world.ranged = false
	now := s.world.networks()
	if now.Equal(before) {
		return before
	}
	if err := target.Renumber(now.Pods, now.Services, s.world.all()); err != nil {
		s.cfg.Log.Error("other ranges of the cluster's addresses have not been taken over in full", "error", err)
	}
	return now
}

// unfinished selects pods that have not finished. One that does is deleted to who watches with it.
func unfinished(o *metav1.ListOptions) {
	o.FieldSelector = fmt.Sprintf("status.phase!=%s,status.phase!=%s", corev1.PodSucceeded, corev1.PodFailed)
}

// watch makes the informers. What it returns is done when all that they had at first is in the queue.
func (s *Source) watch(f informers.SharedInformerFactory) ([]cache.DoneChecker, error) {
	list := map[string]cache.SharedIndexInformer{
		"pods": f.InformerFor(&corev1.Pod{}, func(c kubernetes.Interface, resync time.Duration) cache.SharedIndexInformer {
			return coreinformers.NewFilteredPodInformer(c, metav1.NamespaceAll, resync, cache.Indexers{}, unfinished)
		}),
		"namespaces":      f.Core().V1().Namespaces().Informer(),
		"nodes":           f.Core().V1().Nodes().Informer(),
		"services":        f.Core().V1().Services().Informer(),
		"endpointslices":  f.Discovery().V1().EndpointSlices().Informer(),
		"networkpolicies": f.Networking().V1().NetworkPolicies().Informer(),
	}
	if len(s.cfg.Networks.Services) == 0 {
		list["servicecidrs"] = f.Networking().V1().ServiceCIDRs().Informer()
	}
	var synced []cache.DoneChecker
	for name, informer := range list {
		if err := informer.SetWatchErrorHandlerWithContext(s.complain(name)); err != nil {
			return nil, fmt.Errorf("watch %s: %w", name, err)
		}
		told, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { s.enqueue(o, false) },
			UpdateFunc: func(_, o any) { s.enqueue(o, false) },
			DeleteFunc: func(o any) { s.enqueue(o, true) },
		})
		if err != nil {
			return nil, fmt.Errorf("watch %s: %w", name, err)
		}
		synced = append(synced, told.HasSyncedChecker())
	}
	return synced, nil
}

// complain logs why a list or watch failed. It is tried again, with waits that grow.
func (s *Source) complain(resource string) cache.WatchErrorHandlerWithContext {
	return func(ctx context.Context, _ *cache.Reflector, err error) {
		switch {
		case ctx.Err() != nil, errors.Is(err, io.EOF): // asked to end; or the API server ended it, as it does every few minutes
		case apierrors.IsResourceExpired(err), apierrors.IsGone(err):
			s.cfg.Log.Info("the watch was interrupted for too long to go on; all is listed anew", "resource", resource)
		default:
			s.cfg.Log.Warn("the API server cannot be watched now; what is known stays", "resource", resource, "error", err)
		}
	}
}

func (s *Source) enqueue(obj any, deleted bool) {
	if last, ok := obj.(cache.DeletedFinalStateUnknown); ok { // the deletion itself was missed
		obj = last.Obj
	}
	o, ok := obj.(metav1.Object)
	if !ok {
		s.cfg.Log.Error("the API server's answer holds something that is no object", "type", fmt.Sprintf("%T", obj))
		return
	}
	k, ok := kindOf(o)
	if !ok {
		s.cfg.Log.Error("the API server's answer holds something that was not asked for", "type", fmt.Sprintf("%T", obj))
		return
	}
	s.queue.put(change{key{k, o.GetNamespace(), o.GetName()}, o, deleted})
}
