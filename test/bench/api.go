package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source/kube"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/xds/server"
)

// apiServer is a real one, to which changes are written; the control plane watches it.
type apiServer struct {
	*cluster.APIServer
	client kubernetes.Interface

	mu    sync.Mutex
	known map[string]bool // what is there, by keyOf
}

// writers is how many objects are written at once where there are many.
const writers = 16

func startAPIServer(ctx context.Context) (*apiServer, error) {
	s, err := cluster.StartAPIServer(ctx, cluster.APIServerOptions{Flags: []string{"--service-cluster-ip-range=" + serviceNetwork[0].String()}})
	if err != nil {
		return nil, err
	}
	client, err := clientOf(s.Kubeconfig())
	if err != nil {
		return nil, errors.Join(err, s.Stop())
	}
	return &apiServer{APIServer: s, client: client, known: map[string]bool{"Namespace /kube-system": true}}, nil
}

// clientOf is a client that is not held back.
func clientOf(kubeconfig string) (kubernetes.Interface, error) {
	c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	c = rest.CopyConfig(c)
	c.QPS = -1
	return kubernetes.NewForConfig(c)
}

// load writes a whole world, and notes the UIDs that its pods got.
func (s *apiServer) load(ctx context.Context, w *world) error {
	keys := slices.Sorted(maps.Keys(w.objects))
	for _, namespaces := range []bool{true, false} {
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(writers)
		for _, key := range keys {
			if _, is := w.objects[key].(*corev1.Namespace); is == namespaces {
				g.Go(func() error { return s.put(ctx, w.objects[key]) })
			}
		}
		if err := g.Wait(); err != nil {
			return err
		}
	}
	for i := range w.sidecars {
		w.sidecars[i].uid = string(w.objects["Pod "+w.sidecars[i].key()].GetUID())
	}
	return nil
}

// write writes a change step by step and returns when the last write had returned.
func (s *apiServer) write(ctx context.Context, c change) (time.Duration, error) {
	for _, st := range c {
		for _, obj := range st.deleted {
			if err := s.drop(ctx, obj); err != nil {
				return 0, err
			}
		}
		for _, obj := range st.applied {
			if err := s.put(ctx, obj); err != nil {
				return 0, err
			}
		}
	}
	return clock(), nil
}

// put creates an object, or updates it where it is there.
func (s *apiServer) put(ctx context.Context, obj metav1.Object) (err error) {
	s.mu.Lock()
	is := s.known[keyOf(obj)]
	s.known[keyOf(obj)] = true
	s.mu.Unlock()
	switch o := obj.(type) {
	case *corev1.Namespace:
		err = send(ctx, s.client.CoreV1().Namespaces(), o, is)
	case *corev1.Service:
		err = send(ctx, s.client.CoreV1().Services(o.Namespace), o, is)
	case *discoveryv1.EndpointSlice:
		err = send(ctx, s.client.DiscoveryV1().EndpointSlices(o.Namespace), o, is)
	case *networkingv1.NetworkPolicy:
		err = send(ctx, s.client.NetworkingV1().NetworkPolicies(o.Namespace), o, is)
	case *corev1.Pod:
		err = s.run(ctx, o)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", keyOf(obj), err)
	}
	return nil
}

// writer is what a typed client of any kind can do.
type writer[T any] interface {
	Create(context.Context, T, metav1.CreateOptions) (T, error)
	Update(context.Context, T, metav1.UpdateOptions) (T, error)
}

func send[T any](ctx context.Context, to writer[T], obj T, is bool) (err error) {
	if is {
		_, err = to.Update(ctx, obj, metav1.UpdateOptions{})
	} else {
		_, err = to.Create(ctx, obj, metav1.CreateOptions{})
	}
	return err
}

// run creates a pod as injection makes it, and has it run as its node's kubelet would say.
func (s *apiServer) run(ctx context.Context, o *corev1.Pod) error {
	p := o.DeepCopy()
	p.UID = ""
	p.Spec.Containers[0].Image = "app"
	if p.Annotations[policy.SidecarAnnotation] == policy.SidecarInjected {
		always := corev1.ContainerRestartPolicyAlways
		p.Spec.InitContainers = []corev1.Container{{Name: names.Container, Image: "mantlet", RestartPolicy: &always}}
	}
	pods := s.client.CoreV1().Pods(o.Namespace)
	made, err := pods.Create(ctx, p, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	o.UID = made.UID
	made.Status = o.Status
	_, err = pods.UpdateStatus(ctx, made, metav1.UpdateOptions{})
	return err
}

func (s *apiServer) drop(ctx context.Context, obj metav1.Object) (err error) {
	now := int64(0) // there is no kubelet to wait for
	o := metav1.DeleteOptions{GracePeriodSeconds: &now}
	ns, name := obj.GetNamespace(), obj.GetName()
	switch obj.(type) {
	case *corev1.Pod:
		err = s.client.CoreV1().Pods(ns).Delete(ctx, name, o)
	case *networkingv1.NetworkPolicy:
		err = s.client.NetworkingV1().NetworkPolicies(ns).Delete(ctx, name, o)
	default:
		return fmt.Errorf("delete %s: no workload does that", keyOf(obj))
	}
	s.mu.Lock()
	delete(s.known, keyOf(obj))
	s.mu.Unlock()
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("delete %s: it was not there: %w", keyOf(obj), err)
	}
	return err
}

// watch makes a control plane of what an API server says, as a replica does, and has it follow.
func (p *plane) watch(c planeConfig, authority *ca.CA) error {
	client, err := clientOf(c.Kubeconfig)
	if err != nil {
		return err
	}
	source := kube.New(kube.Config{Client: client, Log: slog.New(slog.DiscardHandler), Networks: kube.Networks{Pods: podNetwork, Services: serviceNetwork}})
	ctx, cancel := context.WithCancel(context.Background())
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		err := source.Run(ctx, func(_ kube.Networks, o *policy.Objects) (kube.Target, error) {
			err := p.serve(c, authority, func(cp *controlplane.ControlPlane) error { return cp.Load(o) })
			if err == nil {
				started <- nil
			}
			return p.ControlPlane, err
		})
		if err == nil {
			err = io.ErrUnexpectedEOF // before it had started
		}
		started <- err
	}()
	if err := <-started; err != nil {
		cancel()
		<-ended
		return err
	}
	stop := p.stop
	p.stop = func() { cancel(); <-ended; stop() }
	return nil
}

// serve makes the control plane, has it take over what there is, and lets sidecars come.
func (p *plane) serve(c planeConfig, authority *ca.CA, load func(*controlplane.ControlPlane) error) error {
	cp, g, err := controlplane.NewServer(config(), authority, tokens{}, server.Config{}, []netip.Addr{netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		return err
	}
	p.ControlPlane = cp
	prof, err := startProfile(c.Profile, "load")
	if err != nil {
		return err
	}
	began, used := clock(), cpu()
	if err := load(cp); err != nil {
		return err
	}
	p.loaded, p.loadCPU = clock()-began, cpu()-used
	if err := prof.stop(); err != nil {
		return err
	}
	if p.listener, err = new(net.ListenConfig).Listen(context.Background(), "tcp", c.Listen); err != nil {
		return err
	}
	go func() { _ = g.Serve(p.listener) }() // ends with Stop
	p.stop = func() { cp.Close(); g.Stop() }
	return nil
}
