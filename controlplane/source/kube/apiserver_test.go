package kube

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/apitest"
)

// patience is how long something may take to arrive: an informer that was cut off waits up to half a minute before it asks again.
const patience = 90 * time.Second

// dualStack is an API server whose Services have addresses of both families.
func dualStack(t *testing.T) *cluster.APIServer {
	return apitest.Start(t, cluster.APIServerOptions{Flags: []string{"--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112"}})
}

// run runs a Source until the test ends, and returns the Target once it has everything.
func run(t *testing.T, cfg Config) *recorded {
	t.Helper()
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	started := make(chan *recorded, 1)
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		ended <- New(cfg).Run(ctx, func(n Networks, o *policy.Objects) (Target, error) {
			r, err := record(n, o)
			started <- r
			return r, err
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case r := <-started:
		return r
	case <-time.After(patience):
		t.Fatal("the cluster is not known after " + patience.String())
		return nil
	}
}

// until waits until the Target answers as wanted.
func (r *recorded) until(t *testing.T, services []*corev1.Service, want func() map[string]string) {
	t.Helper()
	end := time.After(patience)
	for {
		diff := cmp.Diff(want(), r.state(services))
		if diff == "" {
			return
		}
		select {
		case <-r.told:
		case <-end:
			t.Fatalf("after %s it is still another one (-wanted +is):\n%s", patience, diff)
		}
	}
}

// write creates objects, with their status, or brings what is there to that state.
func write(t *testing.T, c kubernetes.Interface, objects ...metav1.Object) {
	t.Helper()
	for _, o := range objects {
		if err := put(t.Context(), c, o); err != nil {
			t.Fatalf("%T %s/%s: %v", o, o.GetNamespace(), o.GetName(), err)
		}
	}
}

func put(ctx context.Context, c kubernetes.Interface, o metav1.Object) (err error) {
	switch o := o.(type) {
	case *corev1.Namespace:
		api := c.CoreV1().Namespaces()
		if _, err = api.Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			_, err = api.Update(ctx, o, metav1.UpdateOptions{})
		}
	case *corev1.Node:
		api := c.CoreV1().Nodes()
		if _, err = api.Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			_, err = api.Update(ctx, o, metav1.UpdateOptions{})
		}
		if err == nil {
			_, err = api.UpdateStatus(ctx, o, metav1.UpdateOptions{})
		}
	case *corev1.Pod:
		api := c.CoreV1().Pods(o.Namespace)
		if _, err = api.Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			var is *corev1.Pod
			if is, err = api.Get(ctx, o.Name, metav1.GetOptions{}); err == nil {
				is.Labels = o.Labels
				_, err = api.Update(ctx, is, metav1.UpdateOptions{})
			}
		}
		if err == nil {
			_, err = api.UpdateStatus(ctx, o, metav1.UpdateOptions{})
		}
	case *corev1.Service:
		api := c.CoreV1().Services(o.Namespace)
		if _, err = api.Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			_, err = api.Update(ctx, o, metav1.UpdateOptions{})
		}
	case *discoveryv1.EndpointSlice:
		api := c.DiscoveryV1().EndpointSlices(o.Namespace)
		if _, err = api.Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			_, err = api.Update(ctx, o, metav1.UpdateOptions{})
		}
	case *networkingv1.NetworkPolicy:
		api := c.NetworkingV1().NetworkPolicies(o.Namespace)
		if _, err = api.Create(ctx, o, metav1.CreateOptions{}); apierrors.IsAlreadyExists(err) {
			_, err = api.Update(ctx, o, metav1.UpdateOptions{})
		}
	case *networkingv1.ServiceCIDR:
		_, err = c.NetworkingV1().ServiceCIDRs().Create(ctx, o, metav1.CreateOptions{})
	}
	return err
}

func remove(ctx context.Context, c kubernetes.Interface, o metav1.Object) (err error) {
	now := metav1.DeleteOptions{GracePeriodSeconds: new(int64)}
	switch o := o.(type) {
	case *corev1.Node:
		err = c.CoreV1().Nodes().Delete(ctx, o.Name, now)
	case *corev1.Pod:
		err = c.CoreV1().Pods(o.Namespace).Delete(ctx, o.Name, now)
	case *corev1.Service:
		err = c.CoreV1().Services(o.Namespace).Delete(ctx, o.Name, now)
	case *discoveryv1.EndpointSlice:
		err = c.DiscoveryV1().EndpointSlices(o.Namespace).Delete(ctx, o.Name, now)
	case *networkingv1.NetworkPolicy:
		err = c.NetworkingV1().NetworkPolicies(o.Namespace).Delete(ctx, o.Name, now)
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// asInCluster are an example's objects as a cluster has them: a sidecar is a container, and no annotation.
func asInCluster(t *testing.T, example string) (m *source.Manifests, cluster []metav1.Object) {
	t.Helper()
	m, err := source.ReadManifests([]string{example}, source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range everything(&m.Objects) {
		if p, ok := o.(*corev1.Pod); ok {
			p = p.DeepCopy()
			if p.Annotations[policy.SidecarAnnotation] == policy.SidecarInjected {
				p.Spec.InitContainers = append(p.Spec.InitContainers, sidecar())
			}
			p.Annotations = nil
			for i := range p.Spec.Containers {
				p.Spec.Containers[i].VolumeMounts = nil // of claims that only a StatefulSet's controller adds
			}
			o = p
		}
		o.SetUID("") // which are the API server's to give
		o.SetOwnerReferences(nil)
		cluster = append(cluster, o)
	}
	return m, cluster
}

// TestAPIServer: the objects of an example give the same verdicts from an API server as from manifests, whether they were there at first or come one
// after the other; and an API server that is restarted while they change loses nothing.
func TestAPIServer(t *testing.T) {
	s := dualStack(t)
	c := apitest.Client(t, s)
	m, objects := asInCluster(t, "../../../examples/shop")
	half := len(objects) / 2
	write(t, c, objects[:half]...)
	r := run(t, Config{Client: apitest.Client(t, s), Networks: Networks{Pods: m.PodNetwork}})
	services := m.Objects.Services
	wanted := func() map[string]string {
		w, err := record(r.ranges(), &m.Objects)
		if err != nil {
			t.Fatal(err)
		}
		return w.state(services)
	}
	write(t, c, objects[half:]...)
	r.until(t, services, wanted)

	first := r.state(services)
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	p := m.Objects.NetworkPolicies[0]
	gone := m.Objects.Pods[0]
	for _, err := range []error{remove(t.Context(), c, p), remove(t.Context(), c, gone)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	m.Objects.NetworkPolicies = m.Objects.NetworkPolicies[1:]
	m.Objects.Pods = m.Objects.Pods[1:]
	if cmp.Equal(first, wanted()) {
		t.Fatal("what is removed makes no difference: the test shows nothing")
	}
	r.until(t, services, wanted)

	for _, kind := range []struct {
		name string
		do   func() error
	}{
		{"a pod finishes", func() error {
			p := m.Objects.Pods[0].DeepCopy()
			p.Status.Phase = corev1.PodSucceeded
			m.Objects.Pods = m.Objects.Pods[1:]
			_, err := c.CoreV1().Pods(p.Namespace).UpdateStatus(t.Context(), p, metav1.UpdateOptions{})
			return err
		}},
		{"a namespace is relabelled", func() error {
			n := m.Objects.Namespaces[0]
			n.Labels = map[string]string{corev1.LabelMetadataName: n.Name, policy.ModeLabel: "strict"}
			return put(t.Context(), c, n)
		}},
		{"a service goes", func() error {
			last := m.Objects.Services[len(m.Objects.Services)-1]
			m.Objects.Services = slices.Clone(m.Objects.Services[:len(m.Objects.Services)-1])
			return remove(t.Context(), c, last)
		}},
		{"endpoints go", func() error {
			last := m.Objects.EndpointSlices[0]
			m.Objects.EndpointSlices = m.Objects.EndpointSlices[1:]
			return remove(t.Context(), c, last)
		}},
		{"a node has a zone", func() error {
			m.Objects.Nodes[0].Labels[corev1.LabelTopologyZone] = "z"
			return put(t.Context(), c, m.Objects.Nodes[0])
		}},
		{"there are more addresses for services", func() error {
			return put(t.Context(), c, serviceCIDR("more", "10.112.0.0/16"))
		}},
	} {
		t.Log(kind.name)
		if err := kind.do(); err != nil {
			t.Fatalf("%s: %v", kind.name, err)
		}
		r.until(t, services, wanted)
	}
	for end := time.After(patience); r.state(nil)["networks"] == first["networks"]; { // the objects are as they were, so that nothing has been waited for yet
		select {
		case <-r.told:
		case <-end:
			t.Fatalf("the new range of service addresses has not arrived: %s", first["networks"])
		}
	}
}
