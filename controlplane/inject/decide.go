package inject

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
)

// Namespace is what injection reads of a pod's namespace.
type Namespace struct {
	Name        string
	Labels      map[string]string
	Annotations map[string]string
}

// NamespaceOf reads a namespace.
func NamespaceOf(o *corev1.Namespace) Namespace {
	return Namespace{Name: o.Name, Labels: o.Labels, Annotations: o.Annotations}
}

// Values of policy.InjectLabel: on namespaces the first three, as a pod's annotation the others.
const (
	enabled  = "enabled"
	required = names.InjectRequired
	disabled = "disabled"
	yes      = "true"
	no       = "false"
)

// IsSystem reports whether pods of a namespace never get a sidecar: Mantlet could come to wait for itself there.
func (c Config) IsSystem(namespace string) bool {
	return namespace == "kube-system" || slices.Contains(c.System, namespace)
}

// asked reports whether a pod is to have a sidecar. Outside of system namespaces its own annotation goes first, as in package source, then
// its namespace's label; only where that is "required" the pod may not opt out. A pod with an init container of the sidecar's name asks by
// that, whatever the label says: the control plane takes such a container for a sidecar, and gives it the pod's identity; so it has to be ours.
func (c Config) asked(pod *corev1.Pod, ns Namespace) (bool, *field.Error) {
	if c.IsSystem(ns.Name) {
		return false, nil
	}
	named := sidecarIn(pod.Spec.InitContainers) >= 0
	switch v, ok := pod.Annotations[policy.InjectLabel]; {
	case v == yes:
		return true, nil
	case v == no && named:
		return false, field.Invalid(field.NewPath("metadata", "annotations").Key(policy.InjectLabel), v,
			"the pod is to have no sidecar, and has an init container "+names.Container+", which would count as one: remove that, or the annotation")
	case v == no && ns.Labels[policy.InjectLabel] == required && noPolicy(pod) == "":
		return false, field.Forbidden(field.NewPath("metadata", "annotations").Key(policy.InjectLabel),
			fmt.Sprintf("namespace %s has the label %s: %s, so none of its pods may go without a sidecar; remove the annotation, or run the pod in another namespace",
				ns.Name, policy.InjectLabel, required))
	case v == no:
		return false, nil
	case ok:
		return false, field.NotSupported(field.NewPath("metadata", "annotations").Key(policy.InjectLabel), v, []string{yes, no})
	case named:
		return true, nil
	}
	switch ns.Labels[policy.InjectLabel] {
	case disabled:
		return false, nil
	case enabled, required:
		return true, nil
	}
	return c.Default, nil
}

// noPolicy says why no policy applies to a pod, or "".
func noPolicy(pod *corev1.Pod) string {
	switch {
	case pod.Spec.HostNetwork:
		return "it uses the node's network (hostNetwork), to which NetworkPolicy does not apply"
	case pod.Annotations[corev1.MirrorPodAnnotationKey] != "":
		return "it is a static pod of a node, which the API server only shows"
	case pod.Spec.OS != nil && pod.Spec.OS.Name == corev1.Windows:
		return "it is for Windows nodes"
	}
	return ""
}

// allowed is what a namespace allows, and a warning for each word that means nothing.
func (ns Namespace) allowed() (map[string]bool, []string) {
	known := []string{names.AllowCapabilities, names.AllowProxyUser, names.AllowHostPID, names.AllowSharedProcesses, names.AllowHostPath, names.AllowExec}
	allowed := map[string]bool{}
	var warnings []string
	for word := range strings.SplitSeq(ns.Annotations[names.AllowAnnotation], ",") {
		word = strings.TrimSpace(word)
		switch {
		case word == "":
		case slices.Contains(known, word):
			allowed[word] = true
		default:
			warnings = append(warnings, fmt.Sprintf("namespace %s: annotation %s: %q allows nothing; known are %s",
				ns.Name, names.AllowAnnotation, word, strings.Join(known, ", ")))
		}
	}
	return allowed, warnings
}
