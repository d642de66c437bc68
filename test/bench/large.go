package main

import (
	"fmt"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The large cluster: 100,000 pods and 75,000 policies.
const (
	largeNamespaces = 25_000
	largeSimulated  = 100 // sidecars that are simulated; the others are known to the control plane and never come
)

// populateLarge makes many small namespaces: in each four pods with three apps, and for each app a policy that admits another of the namespace,
// both ways. n pods have sidecars.
func (w *world) populateLarge(n int) {
	for i := range largeNamespaces {
		name := namespaceName(i)
		w.put(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"kubernetes.io/metadata.name": name}}})
		apps := make([]service, 3)
		for j := range apps {
			apps[j] = service{namespace: name, name: "app-" + strconv.Itoa(j)}
		}
		for j := range 4 {
			var annotations map[string]string
			if w.pods < n {
				annotations = sidecar
			}
			p := w.newPod(name, apps[j%3].name, annotations)
			w.put(p)
			apps[j%3].pods = append(apps[j%3].pods, p.Name)
			if len(w.sidecars) < min(largeSimulated, n) {
				w.sidecars = append(w.sidecars, sidecarPod{name, p.Name, string(p.UID), nil})
			}
		}
		for j, app := range apps {
			p := allowFrom(app, "base", apps[(j+1)%3], 8080)
			p.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{
				To: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprintf("app-%d", (j+2)%3)}}}},
			}}
			p.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
			w.put(p)
		}
		if i == 0 {
			w.services = apps
		}
	}
}
