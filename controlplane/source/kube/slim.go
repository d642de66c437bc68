package kube

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
)

// slim keeps of an object what decides, and what the informer itself needs: a pod of some 10 KB becomes one of some 100 bytes beside its
// labels. It is a cache.TransformFunc; it owns the object, and changes nothing that it has slimmed before.
func slim(obj any) (any, error) {
	switch o := obj.(type) {
	case *corev1.Pod:
		return slimPod(o), nil
	case *corev1.Node:
		return slimNode(o), nil
	case *corev1.Namespace:
		return &corev1.Namespace{ObjectMeta: slimMeta(&o.ObjectMeta)}, nil
	case *corev1.Service:
		meta := slimMeta(&o.ObjectMeta)
		meta.Labels = nil
		return &corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{
			Type: o.Spec.Type, ClusterIP: o.Spec.ClusterIP, ClusterIPs: o.Spec.ClusterIPs, Ports: o.Spec.Ports,
			SessionAffinity: o.Spec.SessionAffinity, InternalTrafficPolicy: o.Spec.InternalTrafficPolicy, ExternalTrafficPolicy: o.Spec.ExternalTrafficPolicy,
			ExternalIPs: o.Spec.ExternalIPs, LoadBalancerSourceRanges: o.Spec.LoadBalancerSourceRanges,
		}, Status: corev1.ServiceStatus{LoadBalancer: o.Status.LoadBalancer}}, nil
	case *discoveryv1.EndpointSlice:
		o.ObjectMeta = slimMeta(&o.ObjectMeta)
		return o, nil
	case *networkingv1.NetworkPolicy:
		mode, has := o.Annotations[policy.PolicyModeAnnotation]
		generation := o.Generation
		o.ObjectMeta = slimMeta(&o.ObjectMeta)
		o.Generation = generation
		if has {
			o.Annotations = map[string]string{policy.PolicyModeAnnotation: mode}
		}
		return o, nil
	case *networkingv1.ServiceCIDR:
		return &networkingv1.ServiceCIDR{ObjectMeta: slimMeta(&o.ObjectMeta), Spec: o.Spec}, nil
	}
	return obj, nil // cache.DeletedFinalStateUnknown, whose object has been here
}

func slimMeta(m *metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion, CreationTimestamp: m.CreationTimestamp, Labels: m.Labels}
}

func slimPod(o *corev1.Pod) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: slimMeta(&o.ObjectMeta),
		Spec:       corev1.PodSpec{NodeName: o.Spec.NodeName, ServiceAccountName: o.Spec.ServiceAccountName, HostNetwork: o.Spec.HostNetwork},
		Status:     corev1.PodStatus{Phase: o.Status.Phase, PodIP: o.Status.PodIP, PodIPs: o.Status.PodIPs, HostIP: o.Status.HostIP, HostIPs: o.Status.HostIPs},
	}
	if hasSidecar(o) {
		p.Annotations = map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}
	}
	for i := range o.Spec.Containers {
		if c, ok := slimContainer(&o.Spec.Containers[i]); ok {
			p.Spec.Containers = append(p.Spec.Containers, c)
		}
	}
	for i := range o.Spec.InitContainers {
		c, ok := slimContainer(&o.Spec.InitContainers[i])
		if restarts(&o.Spec.InitContainers[i]) && (ok || c.Name == names.Container) {
			p.Spec.InitContainers = append(p.Spec.InitContainers, c)
		}
	}
	return p
}

// slimContainer keeps a container's ports that have a name, of which NetworkPolicy speaks, or a port of the node. It reports whether there are any.
func slimContainer(c *corev1.Container) (corev1.Container, bool) {
	ports := slices.DeleteFunc(slices.Clone(c.Ports), func(p corev1.ContainerPort) bool { return p.Name == "" && p.HostPort == 0 })
	return corev1.Container{Name: c.Name, RestartPolicy: c.RestartPolicy, Ports: ports}, len(ports) > 0
}

// hasSidecar reports whether injection gave the pod its native sidecar container.
func hasSidecar(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == names.Container && restarts(&c) })
}

func restarts(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// slimNode keeps a node's zone, ranges and addresses, without names.
func slimNode(o *corev1.Node) *corev1.Node {
	n := &corev1.Node{ObjectMeta: slimMeta(&o.ObjectMeta), Spec: corev1.NodeSpec{PodCIDR: o.Spec.PodCIDR, PodCIDRs: o.Spec.PodCIDRs}}
	n.Labels = nil
	if zone, ok := o.Labels[corev1.LabelTopologyZone]; ok {
		n.Labels = map[string]string{corev1.LabelTopologyZone: zone}
	}
	for _, a := range o.Status.Addresses {
		if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
			n.Status.Addresses = append(n.Status.Addresses, a)
		}
	}
	return n
}
