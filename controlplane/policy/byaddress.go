package policy

import (
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// ByAddress returns where a NetworkPolicy first tells peers by who they are over a protocol that authenticates nobody, UDP or SCTP: there they are told by their
// addresses. It returns nil where no rule does: rules that admit everybody, or ipBlocks alone, ask for nobody's identity, and so do those without ports, which are
// about TCP too.
func ByAddress(np *networkingv1.NetworkPolicy) *field.Path {
	for i, r := range np.Spec.Ingress {
		if at := byAddress(r.From, r.Ports, field.NewPath("spec", "ingress").Index(i)); at != nil {
			return at
		}
	}
	for i, r := range np.Spec.Egress {
		if at := byAddress(r.To, r.Ports, field.NewPath("spec", "egress").Index(i)); at != nil {
			return at
		}
	}
	return nil
}

func byAddress(peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, at *field.Path) *field.Path {
	selects := false
	for _, p := range peers {
		selects = selects || p.PodSelector != nil || p.NamespaceSelector != nil
	}
	if !selects {
		return nil
	}
	for i, p := range ports {
		if p.Protocol != nil && (*p.Protocol == corev1.ProtocolUDP || *p.Protocol == corev1.ProtocolSCTP) {
			return at.Child("ports").Index(i)
		}
	}
	return nil
}
