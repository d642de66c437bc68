package controlplane

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
)

// requiring are the namespaces that require sidecars. It decides nothing here, where pods are as they are: it is for who is told which of them
// should not be.
type requiring map[string]bool

// load takes the place of what was known.
func (r requiring) load(list []*corev1.Namespace) {
	clear(r)
	for _, ns := range list {
		r.apply(ns)
	}
}

func (r requiring) apply(obj metav1.Object) {
	if ns, ok := obj.(*corev1.Namespace); ok {
		delete(r, ns.Name)
		if ns.Labels[policy.InjectLabel] == names.InjectRequired {
			r[ns.Name] = true
		}
	}
}

func (r requiring) delete(obj metav1.Object) {
	if ns, ok := obj.(*corev1.Namespace); ok {
		delete(r, ns.Name)
	}
}
