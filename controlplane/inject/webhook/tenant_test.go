package webhook

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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

func wantRefused(t *testing.T, err error, word string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), word) {
		t.Errorf("got %v, want a refusal with %q", err, word)
	}
	t.Log(err)
}
