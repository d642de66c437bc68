package install

import (
	"slices"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// webhook is what both kinds have of a webhook.
type webhook struct {
	name     string
	fails    admissionregistrationv1.FailurePolicyType
	selector labels.Selector
}

// selects is the API server's question: nil selects nothing for metav1.LabelSelectorAsSelector, and every namespace for a webhook.
func selects(t *testing.T, name string, fails *admissionregistrationv1.FailurePolicyType, s *metav1.LabelSelector) webhook {
	t.Helper()
	if s == nil {
		s = &metav1.LabelSelector{}
	}
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if fails == nil {
		t.Fatalf("%s does not say what its failure means", name)
	}
	return webhook{name, *fails, selector}
}

func webhooks(t *testing.T, list []Manifest) (out []webhook) {
	t.Helper()
	for _, w := range find[admissionregistrationv1.MutatingWebhookConfiguration](t, list, "MutatingWebhookConfiguration").Webhooks {
		out = append(out, selects(t, w.Name, w.FailurePolicy, w.NamespaceSelector))
	}
	for _, w := range find[admissionregistrationv1.ValidatingWebhookConfiguration](t, list, "ValidatingWebhookConfiguration").Webhooks {
		out = append(out, selects(t, w.Name, w.FailurePolicy, w.NamespaceSelector))
	}
	return out
}

// Nothing waits for Mantlet in the namespaces in which a cluster starts again, whatever their label asks for: not even for a warning.
func TestRecovery(t *testing.T) {
	for _, byDefault := range []string{"true", "false"} {
		list := webhooks(t, render(t, Options{Namespace: "shield", Set: []string{"injectByDefault=" + byDefault}}))
		failing := 0
		for _, w := range list {
			if w.fails == admissionregistrationv1.Fail {
				failing++
			}
			for _, ns := range []string{"kube-system", "shield", "kube-public", "kube-node-lease"} {
				for _, l := range labelled(ns) {
					if w.selector.Matches(l) {
						t.Errorf("injectByDefault %s: %s would have namespace %s (%s) wait for it", byDefault, w.name, ns, l)
					}
				}
			}
		}
		if len(list) != 7 || failing != 5 {
			t.Errorf("injectByDefault %s: %d of %d webhooks fail closed, want 5 of 7", byDefault, failing, len(list))
		}
	}
}

// Everywhere else each pod is looked at by the webhooks for namespaces that inject or by those for the others, and never by both.
func TestEveryOtherNamespace(t *testing.T) {
	always := []string{"ephemeral.verify.mantlet.dev", "policies.verify.mantlet.dev"}
	injected := append([]string{"namespaces.inject.mantlet.dev", "host.inject.mantlet.dev", "namespaces.verify.mantlet.dev"}, always...)
	others := append([]string{"pods.inject.mantlet.dev", "pods.verify.mantlet.dev"}, always...)
	for byDefault, want := range map[string][][]string{ // by label: none, enabled, required, disabled
		"false": {others, injected, injected, others},
		"true":  {injected, injected, injected, others},
	} {
		list := webhooks(t, render(t, Options{Namespace: "shield", Set: []string{"injectByDefault=" + byDefault}}))
		for i, l := range labelled("shop") {
			var got []string
			for _, w := range list {
				if w.selector.Matches(l) {
					got = append(got, w.name)
				}
			}
			slices.Sort(got)
			if sorted := slices.Sorted(slices.Values(want[i])); !slices.Equal(got, sorted) {
				t.Errorf("injectByDefault %s, namespace %s: webhooks %q, want %q", byDefault, l, got, sorted)
			}
		}
	}
}

// labelled are the labels of a namespace: none of Mantlet's, and all that it knows.
func labelled(ns string) []labels.Set {
	out := []labels.Set{{corev1.LabelMetadataName: ns}}
	for _, v := range []string{"enabled", "required", "disabled"} {
		out = append(out, labels.Set{corev1.LabelMetadataName: ns, policy.InjectLabel: v})
	}
	return out
}
