package webhook

import (
	"errors"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/policy"
)

// BenchmarkCreate is what admission costs the creation of a pod: with the sidecar, and of a pod that opted out beside it.
func BenchmarkCreate(b *testing.B) {
	w := newWorld(b)
	l := listen(b, "127.0.0.1:0")
	w.namespace("shop", map[string]string{policy.InjectLabel: "enabled"})
	w.install(l.Addr().String())
	defer w.serve(l)()
	w.await("the webhooks are known", func() error {
		p, err := w.create("shop", metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}, nil)
		if err == nil && !inject.HasSidecar(p) {
			err = errors.New("no sidecar yet")
		}
		return err
	})
	for name, annotation := range map[string]string{"injected": "true", "opted out": "false"} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				if _, err := w.create("shop", metav1.CreateOptions{}, annotated(annotation)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
