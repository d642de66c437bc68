package kube

import (
	"cmp"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// kind is one of the kinds that are watched, in the order in which changes of several are taken over.
type kind int

const (
	serviceCIDRs kind = iota
	nodes
	namespaces
	policies
	services
	endpointSlices
	pods
)

func kindOf(o metav1.Object) (kind, bool) {
	switch o.(type) {
	case *networkingv1.ServiceCIDR:
		return serviceCIDRs, true
	case *corev1.Node:
		return nodes, true
	case *corev1.Namespace:
		return namespaces, true
	case *networkingv1.NetworkPolicy:
		return policies, true
	case *corev1.Service:
		return services, true
	case *discoveryv1.EndpointSlice:
		return endpointSlices, true
	case *corev1.Pod:
		return pods, true
	}
	return 0, false
}

// key names an object.
type key struct {
	kind            kind
	namespace, name string
}

func compareKeys(a, b key) int {
	return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
}

// change is the latest that is known of an object: its state, or, deleted, its last one.
type change struct {
	key     key
	object  metav1.Object
	deleted bool
}

// queue holds what has not been taken over yet: of each object only the latest, so that it never holds more than the cluster does.
type queue struct {
	mu     sync.Mutex
	latest map[key]change
	filled chan struct{} // holds one token while there may be something
}

func newQueue() *queue {
	return &queue{latest: map[key]change{}, filled: make(chan struct{}, 1)}
}

func (q *queue) put(c change) {
	q.mu.Lock()
	q.latest[c.key] = c
	q.mu.Unlock()
	select {
	case q.filled <- struct{}{}:
	default:
	}
}

// take empties the queue, in the order of kinds and names.
func (q *queue) take() []change {
	q.mu.Lock()
	latest := q.latest
	q.latest = map[key]change{}
	q.mu.Unlock()
	out := make([]change, 0, len(latest))
	for _, c := range latest {
		out = append(out, c)
	}
	slices.SortFunc(out, func(a, b change) int { return compareKeys(a.key, b.key) })
	return out
}
