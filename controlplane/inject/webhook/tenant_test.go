package webhook

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
)

// forged adds a container that the control plane would take for a sidecar.
func forged(p *corev1.Pod) {
	p.Spec.InitContainers = []corev1.Container{{Name: names.Container, Image: "evil:1", RestartPolicy: new(corev1.ContainerRestartPolicyAlways)}}
}

// What somebody who may do everything to pods in a namespace tries, to have one that counts as enforced and is not.
func testTenant(t *testing.T, w *world) {
	t.Run("a sidecar of one's own, opted out", func(t *testing.T) {
		_, err := w.create("shop", metav1.CreateOptions{}, func(p *corev1.Pod) { annotated("false")(p); forged(p) })
		wantRefused(t, err, "mantlet-proxy")
	})
	t.Run("a sidecar of one's own where nobody is injected", func(t *testing.T) {
		p, err := w.create("plain", metav1.CreateOptions{}, forged)
		if err != nil {
			t.Fatal(err)
		}
		asked := inject.Namespace{Name: "plain", Labels: map[string]string{policy.InjectLabel: "enabled"}}
		if err := inject.Verify(p, asked, testInject()); err != nil {
			t.Error(err)
		}
	})
}

// What somebody who may do everything in a namespace tries with pods that have a sidecar, and with what sidecars trust. The API server itself
// says no, so that it does while Mantlet is away.
func testGuarded(t *testing.T, w *world) {
	p := w.injected()
	pods := w.api.CoreV1().Pods("shop")
	t.Run("another image for the sidecar", func(t *testing.T) {
		for image, refused := range map[string]bool{"evil:1": true, testInject().Image: false} {
			changed := p.DeepCopy()
			changed.Spec.InitContainers[0].Image = image
			changed.Spec.Containers[0].Image = "web:2"
			_, err := pods.Update(t.Context(), changed, metav1.UpdateOptions{DryRun: []string{metav1.DryRunAll}})
			switch {
			case refused:
				wantRefused(t, err, "image of mantlet-proxy")
			case err != nil:
				t.Errorf("another image for the app alone: %v", err)
			}
		}
	})
	t.Run("a shell in the sidecar", func(t *testing.T) {
		exec := func(container string) error {
			return w.api.CoreV1().RESTClient().Post().Namespace("shop").Resource("pods").Name(p.Name).SubResource("exec").
				VersionedParams(&corev1.PodExecOptions{Container: container, Command: []string{"envoy"}, Stdout: true}, scheme.ParameterCodec).Do(t.Context()).Error()
		}
		const reached = "does not have a host assigned" // whoever was let so far
		wantRefused(t, exec(names.Container), "its key")
		wantRefused(t, exec("app"), reached)
		w.allow("shop", "capabilities, "+names.AllowExec)
		w.await("the namespace allows it", func() error {
			if err := exec(names.Container); !strings.Contains(err.Error(), reached) {
				return err
			}
			return nil
		})
		w.allow("shop", "")
		w.await("the namespace does not allow it any more", func() error {
			if err := exec(names.Container); strings.Contains(err.Error(), reached) {
				return err
			}
			return nil
		})
	})
	t.Run("a root of one's own", func(t *testing.T) {
		root := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: names.RootConfigMap}, Data: map[string]string{names.RootKey: "evil"}}
		maps := w.api.CoreV1().ConfigMaps("shop")
		_, err := maps.Create(t.Context(), root, metav1.CreateOptions{})
		wantRefused(t, err, "sidecars trust")
		own := w.control().CoreV1().ConfigMaps("shop")
		if _, err := own.Create(t.Context(), root, metav1.CreateOptions{}); err != nil {
			t.Fatalf("the control plane itself: %v", err)
		}
		_, err = maps.Update(t.Context(), root, metav1.UpdateOptions{})
		wantRefused(t, err, "sidecars trust")
		if _, err := own.Update(t.Context(), root, metav1.UpdateOptions{}); err != nil {
			t.Errorf("the control plane itself: %v", err)
		}
		root.Name = "another"
		if _, err := maps.Create(t.Context(), root, metav1.CreateOptions{}); err != nil {
			t.Errorf("another ConfigMap: %v", err)
		}
		for who, api := range map[string]typedcorev1.ConfigMapInterface{"whoever deletes a namespace deletes what is in it": maps, "one that is immutable has to go": own} {
			root.Name, root.Immutable = names.RootConfigMap, new(true)
			if _, err := own.Create(t.Context(), root, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
				t.Fatal(err)
			}
			if err := api.Delete(t.Context(), names.RootConfigMap, metav1.DeleteOptions{}); err != nil {
				t.Errorf("%s: %v", who, err)
			}
		}
	})
}

// injected is a pod with a sidecar, made before if Mantlet is away.
func (w *world) injected() *corev1.Pod {
	w.t.Helper()
	list, err := w.api.CoreV1().Pods("shop").List(w.t.Context(), metav1.ListOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	i := slices.IndexFunc(list.Items, func(p corev1.Pod) bool { return inject.HasSidecar(&p) })
	if i < 0 {
		w.t.Fatal("no pod with a sidecar")
	}
	return &list.Items[i]
}

func (w *world) allow(namespace, words string) {
	w.t.Helper()
	ns, err := w.api.CoreV1().Namespaces().Get(w.t.Context(), namespace, metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	ns.Annotations = map[string]string{names.AllowAnnotation: words}
	if _, err := w.api.CoreV1().Namespaces().Update(w.t.Context(), ns, metav1.UpdateOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

func wantRefused(t *testing.T, err error, word string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), word) {
		t.Errorf("got %v, want a refusal with %q", err, word)
	}
	t.Log(err)
}
