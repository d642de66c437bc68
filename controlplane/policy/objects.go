package policy

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
)

// The labels and annotations that Mantlet reads from Kubernetes objects.
const (
	// InjectLabel on a namespace, with the value "enabled" or "required", gives its pods a sidecar; a pod may opt out by an annotation of the same
	// name, "false", of the first only.
	InjectLabel = "mantlet.dev/inject"
	// ModeLabel on a namespace is "permissive" or "strict"; without it the configuration's default holds.
	ModeLabel = "mantlet.dev/mtls"
	// SidecarAnnotation on a pod, with the value SidecarInjected, says that the pod has a sidecar. Whoever injects writes it.
	SidecarAnnotation = "mantlet.dev/sidecar"
	// SidecarInjected is the value of SidecarAnnotation.
	SidecarInjected = "injected"
	// PolicyModeAnnotation on a NetworkPolicy asks for another mode than enforcing; none other is supported yet.
	PolicyModeAnnotation = "mantlet.dev/mode"
)

// Objects are the Kubernetes objects that decide, of one cluster at one time. Pods carry their addresses in status.podIPs and
// the addresses of their node in status.hostIPs: all from which it may speak to them. Services carry their addresses in spec.clusterIPs.
type Objects struct {
	Namespaces      []*corev1.Namespace
	Nodes           []*corev1.Node
	Pods            []*corev1.Pod
	Services        []*corev1.Service
	EndpointSlices  []*discoveryv1.EndpointSlice
	NetworkPolicies []*networkingv1.NetworkPolicy
}
