package policy

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1validation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// Validate says what is wrong with a NetworkPolicy: everything in its spec that the API server refuses, and what Mantlet does not
// support yet. It does not look at the object's name. Nothing found: an empty list.
//
// It is stricter than the API server in one point: addresses must be written canonically (no leading zeros in a number, no
// IPv4-mapped IPv6), because readers disagree on what the others mean.
func Validate(np *networkingv1.NetworkPolicy) field.ErrorList {
	var errs field.ErrorList
	if mode, ok := np.Annotations[PolicyModeAnnotation]; ok {
		errs = append(errs, field.Forbidden(field.NewPath("metadata", "annotations").Key(PolicyModeAnnotation),
			fmt.Sprintf("mode %q is not supported yet; without the annotation the policy is enforced", mode)))
	}
	spec := field.NewPath("spec")
	selector := metav1validation.LabelSelectorValidationOptions{}
	errs = append(errs, metav1validation.ValidateLabelSelector(&np.Spec.PodSelector, selector, spec.Child("podSelector"))...)
	for i := range np.Spec.Ingress {
		r, at := &np.Spec.Ingress[i], spec.Child("ingress").Index(i)
		errs = append(errs, validatePorts(r.Ports, at.Child("ports"))...)
		errs = append(errs, validatePeers(r.From, at.Child("from"))...)
	}
	for i := range np.Spec.Egress {
		r, at := &np.Spec.Egress[i], spec.Child("egress").Index(i)
		errs = append(errs, validatePorts(r.Ports, at.Child("ports"))...)
		errs = append(errs, validatePeers(r.To, at.Child("to"))...)
	}
	return append(errs, validateTypes(np.Spec.PolicyTypes, spec.Child("policyTypes"))...)
}

var policyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress, networkingv1.PolicyTypeIngress}

func validateTypes(types []networkingv1.PolicyType, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	if len(types) > len(policyTypes) {
		errs = append(errs, field.TooMany(at, len(types), len(policyTypes)))
	}
	for i, t := range types {
		if t != networkingv1.PolicyTypeIngress && t != networkingv1.PolicyTypeEgress {
			errs = append(errs, field.NotSupported(at.Index(i), t, policyTypes))
		}
	}
	return errs
}

func validatePorts(ports []networkingv1.NetworkPolicyPort, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	for i := range ports {
		errs = append(errs, validatePort(&ports[i], at.Index(i))...)
	}
	return errs
}

var protocols = []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}

func validatePort(p *networkingv1.NetworkPolicyPort, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	if p.Protocol != nil {
		switch *p.Protocol {
		case corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP:
		default: // also the empty string: only an absent protocol is TCP
			errs = append(errs, field.NotSupported(at.Child("protocol"), *p.Protocol, protocols))
		}
	}
	port, end := at.Child("port"), at.Child("endPort")
	switch {
	case p.Port == nil:
		if p.EndPort != nil {
			errs = append(errs, field.Invalid(end, *p.EndPort, "a range needs the port that it starts at"))
		}
	case p.Port.Type == intstr.String:
		if p.EndPort != nil {
			errs = append(errs, field.Invalid(end, *p.EndPort, "a range cannot start at a named port"))
		}
		for _, msg := range validation.IsValidPortName(p.Port.StrVal) {
			errs = append(errs, field.Invalid(port, p.Port.StrVal, msg))
		}
	default:
		for _, msg := range validation.IsValidPortNum(int(p.Port.IntVal)) {
			errs = append(errs, field.Invalid(port, p.Port.IntVal, msg))
		}
		if p.EndPort == nil {
			break
		}
		if *p.EndPort < p.Port.IntVal {
			errs = append(errs, field.Invalid(end, *p.EndPort, fmt.Sprintf("is less than port, %d", p.Port.IntVal)))
		}
		for _, msg := range validation.IsValidPortNum(int(*p.EndPort)) {
			errs = append(errs, field.Invalid(end, *p.EndPort, msg))
		}
	}
	return errs
}

func validatePeers(peers []networkingv1.NetworkPolicyPeer, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	selector := metav1validation.LabelSelectorValidationOptions{}
	for i := range peers {
		p, at := &peers[i], at.Index(i)
		if p.PodSelector == nil && p.NamespaceSelector == nil && p.IPBlock == nil {
			errs = append(errs, field.Required(at, "a peer needs podSelector, namespaceSelector or ipBlock; to admit everybody leave the whole list out"))
			continue
		}
		errs = append(errs, metav1validation.ValidateLabelSelector(p.PodSelector, selector, at.Child("podSelector"))...)
		errs = append(errs, metav1validation.ValidateLabelSelector(p.NamespaceSelector, selector, at.Child("namespaceSelector"))...)
		if p.IPBlock == nil {
			continue
		}
		if p.PodSelector != nil || p.NamespaceSelector != nil {
			errs = append(errs, field.Forbidden(at, "ipBlock cannot stand beside a selector in one peer; make them two peers"))
		}
		errs = append(errs, validateBlock(p.IPBlock, at.Child("ipBlock"))...)
	}
	return errs
}

func validateBlock(b *networkingv1.IPBlock, at *field.Path) field.ErrorList {
	if b.CIDR == "" {
		return field.ErrorList{field.Required(at.Child("cidr"), "an ipBlock without cidr admits nothing")}
	}
	cidr, err := validCIDR(b.CIDR, at.Child("cidr"))
	errs := field.ErrorList{}
	if err != nil {
		errs = append(errs, err)
	}
	for i, s := range b.Except {
		at := at.Child("except").Index(i)
		e, bad := validCIDR(s, at)
		switch {
		case bad != nil:
			errs = append(errs, bad)
		case err == nil && (e.Bits() <= cidr.Bits() || !cidr.Contains(e.Addr())):
			errs = append(errs, field.Invalid(at, s, fmt.Sprintf("lies not strictly within cidr %s", b.CIDR)))
		}
	}
	return errs
}

func validCIDR(s string, at *field.Path) (netip.Prefix, *field.Error) {
	p, err := parsePrefix(s)
	if err != nil {
		return p, field.Invalid(at, s, "not a CIDR, such as 10.0.0.0/8 or fd00::/64")
	}
	return p, nil
}
