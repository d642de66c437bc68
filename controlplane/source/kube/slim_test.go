package kube

import (
	"fmt"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
)

// examples are folders of manifests.
func examples(t *testing.T) (out []string) {
	t.Helper()
	const dir = "../../../examples/"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if _, err := os.Stat(dir + e.Name() + "/expected.txt"); err == nil {
			out = append(out, dir+e.Name())
		}
	}
	if len(out) < 5 {
		t.Fatalf("only %d examples are found", len(out))
	}
	return out
}

// TestSlimKeepsWhatDecides: slimmed objects give the very verdicts that whole ones give, and to slim twice is to slim once.
func TestSlimKeepsWhatDecides(t *testing.T) {
	for _, example := range examples(t) {
		m, err := source.ReadManifests([]string{example}, source.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range m.Objects.Services { // node ports decide, too
			if s.Spec.Type != corev1.ServiceTypeExternalName && s.Spec.ClusterIP != corev1.ClusterIPNone {
				s.Spec.Type, s.Spec.ExternalTrafficPolicy = corev1.ServiceTypeNodePort, corev1.ServiceExternalTrafficPolicyLocal
				for j := range s.Spec.Ports {
					s.Spec.Ports[j].NodePort = int32(30000 + 10*i + j)
				}
				proxy := corev1.LoadBalancerIPModeProxy
				s.Spec.ExternalIPs, s.Spec.LoadBalancerSourceRanges = []string{fmt.Sprint("203.0.113.", i)}, []string{"10.64.0.0/29"}
				s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: fmt.Sprint("198.51.100.", i)}, {IP: fmt.Sprint("192.0.2.", i), IPMode: &proxy}}
			}
		}
		for i, p := range m.Objects.Pods { // host ports, too
			for j := range p.Spec.Containers {
				p.Spec.Containers[j].Ports = append(p.Spec.Containers[j].Ports, corev1.ContainerPort{ContainerPort: 8080, HostPort: int32(9000 + 10*i + j), HostIP: []string{"", "10.64.0.1"}[i%2]})
			}
		}
		networks := Networks{Pods: m.PodNetwork, Services: m.ServiceNetwork}
		whole, _ := record(networks, &m.Objects)
		slimmed, _ := record(networks, &policy.Objects{})
		var list []metav1.Object
		for _, o := range everything(&m.Objects) {
			if p, ok := o.(*corev1.Pod); ok && p.Annotations[policy.SidecarAnnotation] == policy.SidecarInjected {
				p.Annotations = map[string]string{"kubernetes.io/whatever": "x"}
				p.Spec.InitContainers = append(p.Spec.InitContainers, sidecar())
			}
			once := slimOf(t, o)
			before := once.(runtime.Object).DeepCopyObject()
			if diff := cmp.Diff(before, slimOf(t, once)); diff != "" {
				t.Errorf("%T %s: slimmed twice it is another one:\n%s", o, o.GetName(), diff)
			}
			list = append(list, once)
		}
		_ = slimmed.Update(list, nil)
		if diff := cmp.Diff(state(whole.index, m.Objects.Services), state(slimmed.index, m.Objects.Services)); diff != "" || len(whole.errs)+len(slimmed.errs) > 0 {
			t.Errorf("%s: what decides was cut away: %v %v\n%s", example, whole.errs, slimmed.errs, diff)
		}
	}
}

// TestSidecarIsTheContainer: what annotations say decides nothing.
func TestSidecarIsTheContainer(t *testing.T) {
	claims := map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}
	once := sidecar()
	once.RestartPolicy = nil
	for name, c := range map[string]struct {
		pod  corev1.Pod
		want bool
	}{
		"injected":                     {corev1.Pod{Spec: corev1.PodSpec{InitContainers: []corev1.Container{sidecar()}}}, true},
		"claims to be":                 {corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: claims}}, false},
		"an app container of the name": {corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{sidecar()}}}, false},
		"an init container that ends":  {corev1.Pod{Spec: corev1.PodSpec{InitContainers: []corev1.Container{once}}}, false},
	} {
		got := slimOf(t, &c.pod).GetAnnotations()[policy.SidecarAnnotation] == policy.SidecarInjected
		if got != c.want {
			t.Errorf("%s: sidecar %t, want %t", name, got, c.want)
		}
	}
}
