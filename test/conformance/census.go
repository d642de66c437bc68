package main

import (
	"context"
	"fmt"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/mantlet/mantlet/controlplane/inject"
)

// census counts the pods that the tests make, by whether they have a sidecar: a suite that passes without sidecars would prove nothing.
type census struct {
	mu   sync.Mutex
	pods map[types.UID]bool // has a sidecar
	bare map[string]bool    // namespace/name of those without
}

// counts are of the pods that were there at some time.
type counts struct {
	Sidecars int
	Bare     []string // namespace/name
}

func connect(kubeconfig string) (kubernetes.Interface, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	return kubernetes.NewForConfig(cfg)
}

func newCensus(ctx context.Context, client kubernetes.Interface) (*census, error) {
	c := &census{pods: map[types.UID]bool{}, bare: map[string]bool{}}
	f := informers.NewSharedInformerFactory(client, 0)
	pods := f.Core().V1().Pods().Informer()
	if _, err := pods.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(o any) { c.take(o.(*corev1.Pod)) }}); err != nil {
		return nil, err
	}
	f.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), pods.HasSynced) {
		return nil, fmt.Errorf("pods: %w", ctx.Err())
	}
	return c, nil
}

// ofSystem are namespaces that no test has made.
func ofSystem(namespace string) bool {
	return strings.HasPrefix(namespace, "kube-") || namespace == "mantlet-system" || namespace == "default"
}

func (c *census) take(p *corev1.Pod) {
	if ofSystem(p.Namespace) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pods[p.UID] = inject.HasSidecar(p)
	if !c.pods[p.UID] {
		c.bare[p.Namespace+"/"+p.Name] = true
	}
}

func (c *census) counts() (out counts) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, has := range c.pods {
		if has {
			out.Sidecars++
		}
	}
	for name := range c.bare {
		out.Bare = append(out.Bare, name)
	}
	return out
}
