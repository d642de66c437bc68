package source

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	metav1validation "k8s.io/apimachinery/pkg/apis/meta/v1/validation"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// The checks of this file say what the API server would refuse, as far as it decides connectivity, and what Mantlet cannot do.

func checkPolicy(o *networkingv1.NetworkPolicy) field.ErrorList { return policy.Validate(o) }

func checkNamespace(o *corev1.Namespace) field.ErrorList {
	mode, ok := o.Labels[policy.ModeLabel]
	if ok && mode != verdict.Permissive.String() && mode != verdict.Strict.String() {
		return field.ErrorList{field.NotSupported(field.NewPath("metadata", "labels").Key(policy.ModeLabel), mode,
			[]string{verdict.Permissive.String(), verdict.Strict.String()})}
	}
	return nil
}

func checkPod(o *corev1.Pod) field.ErrorList {
	errs := checkInjection(o.Annotations, field.NewPath("metadata", "annotations"))
	if !finished(o) {
		errs = append(errs, checkPodSpec(&o.Spec, field.NewPath("spec"))...)
	}
	at := field.NewPath(podIPField(o))
	ips := podIPs(o)
	for i, s := range ips {
		a, err := parseAddr(s)
		switch {
		case err != nil:
			errs = append(errs, field.Invalid(at.Index(i), s, err.Error()))
		case i > 1 || i == 1 && sameFamily(s, ips[0]):
			errs = append(errs, field.Invalid(at.Index(i), s, "a pod has at most one address of each family"))
		case slices.Contains(nodeIPs, a):
			if !o.Spec.HostNetwork {
				errs = append(errs, field.Invalid(at.Index(i), s, "is the address of the node here"))
			}
		}
	}
	return errs
}

func checkInjection(annotations map[string]string, at *field.Path) field.ErrorList {
	if v, ok := annotations[policy.InjectLabel]; ok && v != "true" && v != "false" {
		return field.ErrorList{field.NotSupported(at.Key(policy.InjectLabel), v, []string{"true", "false"})}
	}
	return nil
}

func checkPodSpec(spec *corev1.PodSpec, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	if name := spec.ServiceAccountName; name != "" {
		for _, msg := range apivalidation.ValidateServiceAccountName(name, false) {
			errs = append(errs, field.Invalid(at.Child("serviceAccountName"), name, msg))
		}
	}
	for i := range spec.InitContainers {
		errs = append(errs, checkContainerPorts(&spec.InitContainers[i], spec.HostNetwork, at.Child("initContainers").Index(i).Child("ports"))...)
	}
	for i := range spec.Containers {
		errs = append(errs, checkContainerPorts(&spec.Containers[i], spec.HostNetwork, at.Child("containers").Index(i).Child("ports"))...)
	}
	return errs
}

func checkContainerPorts(c *corev1.Container, hostNetwork bool, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	for i, p := range c.Ports {
		at := at.Index(i)
		for _, msg := range validation.IsValidPortNum(int(p.ContainerPort)) {
			errs = append(errs, field.Invalid(at.Child("containerPort"), p.ContainerPort, msg))
		}
		errs = append(errs, checkProtocol(p.Protocol, at)...)
		if p.HostPort != 0 {
			for _, msg := range validation.IsValidPortNum(int(p.HostPort)) {
				errs = append(errs, field.Invalid(at.Child("hostPort"), p.HostPort, msg))
			}
		}
		if p.HostIP != "" {
			if a, err := netip.ParseAddr(p.HostIP); err != nil || a.Zone() != "" { // any: 0.0.0.0 means all, and 127.0.0.1 no pod sees
				errs = append(errs, field.Invalid(at.Child("hostIP"), p.HostIP, "not an IP address, such as 192.0.2.7, or 0.0.0.0 for all of the node's"))
			}
		}
		if p.Name != "" {
			for _, msg := range validation.IsValidPortName(p.Name) {
				errs = append(errs, field.Invalid(at.Child("name"), p.Name, msg))
			}
		}
		capture := p.ContainerPort == names.InboundPort || p.ContainerPort == names.OutboundPort
		if capture && (p.Protocol == "" || p.Protocol == corev1.ProtocolTCP) && !hostNetwork {
			errs = append(errs, field.Forbidden(at.Child("containerPort"),
				fmt.Sprintf("TCP port %d is where the sidecar captures connections; let the app listen at another one", p.ContainerPort)))
		}
	}
	return errs
}

func checkProtocol(p corev1.Protocol, at *field.Path) field.ErrorList {
	if _, err := verdict.ParseProtocol(string(p)); err != nil {
		return field.ErrorList{field.NotSupported(at.Child("protocol"), p, []corev1.Protocol{"TCP", "UDP", "SCTP"})}
	}
	return nil
}

// checkWorkload checks what pods are made of.
func checkWorkload(w *workload) field.ErrorList {
	template := w.templatePath
	meta := template.Child("metadata")
	errs := metav1validation.ValidateLabels(w.template.Labels, meta.Child("labels"))
	errs = append(errs, apivalidation.ValidateAnnotations(w.template.Annotations, meta.Child("annotations"))...)
	errs = append(errs, checkInjection(w.template.Annotations, meta.Child("annotations"))...)
	errs = append(errs, checkPodSpec(&w.template.Spec, template.Child("spec"))...)
	if w.replicas != nil && *w.replicas < 0 {
		errs = append(errs, field.Invalid(w.replicasPath, *w.replicas, "must not be negative"))
	}
	if !w.selects {
		return errs
	}
	at := field.NewPath("spec", "selector")
	switch bad := metav1validation.ValidateLabelSelector(w.selector, metav1validation.LabelSelectorValidationOptions{}, at); {
	case w.selector == nil || len(w.selector.MatchLabels)+len(w.selector.MatchExpressions) == 0:
		errs = append(errs, field.Required(at, "it says which pods belong to the "+w.kind))
	case len(bad) > 0:
		errs = append(errs, bad...)
	case !selectsLabels(w.selector, w.template.Labels):
		errs = append(errs, field.Invalid(meta.Child("labels"), w.template.Labels, "spec.selector does not match them"))
	}
	return errs
}

func checkService(o *corev1.Service) field.ErrorList {
	at := field.NewPath("spec")
	errs := metav1validation.ValidateLabels(o.Spec.Selector, at.Child("selector"))
	types := []corev1.ServiceType{corev1.ServiceTypeClusterIP, corev1.ServiceTypeNodePort, corev1.ServiceTypeLoadBalancer, corev1.ServiceTypeExternalName}
	if o.Spec.Type != "" && !slices.Contains(types, o.Spec.Type) {
		errs = append(errs, field.NotSupported(at.Child("type"), o.Spec.Type, types))
	}
	affinities := []corev1.ServiceAffinity{corev1.ServiceAffinityNone, corev1.ServiceAffinityClientIP}
	if a := o.Spec.SessionAffinity; a != "" && !slices.Contains(affinities, a) {
		errs = append(errs, field.NotSupported(at.Child("sessionAffinity"), a, affinities))
	}
	locals := []corev1.ServiceInternalTrafficPolicy{corev1.ServiceInternalTrafficPolicyCluster, corev1.ServiceInternalTrafficPolicyLocal}
	if p := o.Spec.InternalTrafficPolicy; p != nil && !slices.Contains(locals, *p) {
		errs = append(errs, field.NotSupported(at.Child("internalTrafficPolicy"), *p, locals))
	}
	distributions := []string{corev1.ServiceTrafficDistributionPreferClose, corev1.ServiceTrafficDistributionPreferSameNode, corev1.ServiceTrafficDistributionPreferSameZone}
	if d := o.Spec.TrafficDistribution; d != nil && !slices.Contains(distributions, *d) {
		errs = append(errs, field.NotSupported(at.Child("trafficDistribution"), *d, distributions))
	}
	for i, f := range o.Spec.IPFamilies {
		if f != corev1.IPv4Protocol && f != corev1.IPv6Protocol || i > 0 && slices.Contains(o.Spec.IPFamilies[:i], f) {
			errs = append(errs, field.Invalid(at.Child("ipFamilies").Index(i), f, "must be IPv4 or IPv6, each at most once"))
		}
	}
	policies := []corev1.IPFamilyPolicy{corev1.IPFamilyPolicySingleStack, corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack}
	if p := o.Spec.IPFamilyPolicy; p != nil && !slices.Contains(policies, *p) {
		errs = append(errs, field.NotSupported(at.Child("ipFamilyPolicy"), *p, policies))
	}
	ips := clusterIPs(o)
	if o.Spec.ClusterIP != "" && len(ips) > 0 && o.Spec.ClusterIP != ips[0] {
		errs = append(errs, field.Invalid(at.Child("clusterIPs"), ips, "the first must be the clusterIP, "+o.Spec.ClusterIP))
	}
	for i, s := range ips {
		if s == corev1.ClusterIPNone && len(ips) == 1 {
			continue
		}
		at := field.NewPath(clusterIPField(o)).Index(i)
		if a, err := parseAddr(s); err != nil {
			errs = append(errs, field.Invalid(at, s, err.Error()))
		} else if slices.Contains(nodeIPs, a) {
			errs = append(errs, field.Invalid(at, s, "is the address of the node here"))
		} else if i > 1 || i == 1 && sameFamily(s, ips[0]) {
			errs = append(errs, field.Invalid(at, s, "a Service has at most one address of each family"))
		}
	}
	return append(errs, checkServicePorts(o, at.Child("ports"))...)
}

func checkServicePorts(o *corev1.Service, at *field.Path) field.ErrorList {
	var errs field.ErrorList
	if len(o.Spec.Ports) == 0 && o.Spec.Type != corev1.ServiceTypeExternalName && !headless(o) {
		errs = append(errs, field.Required(at, "only a headless Service can do without ports"))
	}
	type key struct {
		protocol corev1.Protocol
		port     int32
	}
	named, numbered := map[string]bool{}, map[key]bool{}
	for i, p := range o.Spec.Ports {
		at := at.Index(i)
		for _, msg := range validation.IsValidPortNum(int(p.Port)) {
			errs = append(errs, field.Invalid(at.Child("port"), p.Port, msg))
		}
		errs = append(errs, checkProtocol(p.Protocol, at)...)
		switch {
		case p.Name == "" && len(o.Spec.Ports) > 1:
			errs = append(errs, field.Required(at.Child("name"), "each of several ports needs a name"))
		case p.Name != "" && named[p.Name]:
			errs = append(errs, field.Duplicate(at.Child("name"), p.Name))
		case p.Name != "":
			for _, msg := range validation.IsDNS1123Label(p.Name) {
				errs = append(errs, field.Invalid(at.Child("name"), p.Name, msg))
			}
		}
		named[p.Name] = true
		k := key{protocolOr(p.Protocol), p.Port}
		if numbered[k] {
			errs = append(errs, field.Duplicate(at, fmt.Sprintf("%d/%s", k.port, k.protocol)))
		}
		numbered[k] = true
		switch {
		case p.TargetPort.Type == intstr.String:
			for _, msg := range validation.IsValidPortName(p.TargetPort.StrVal) {
				errs = append(errs, field.Invalid(at.Child("targetPort"), p.TargetPort.StrVal, msg))
			}
		case p.TargetPort.IntVal != 0: // 0 is absent
			for _, msg := range validation.IsValidPortNum(int(p.TargetPort.IntVal)) {
				errs = append(errs, field.Invalid(at.Child("targetPort"), p.TargetPort.IntVal, msg))
			}
		}
	}
	return errs
}

func checkSlice(o *discoveryv1.EndpointSlice) field.ErrorList {
	var errs field.ErrorList
	switch o.AddressType {
	case discoveryv1.AddressTypeFQDN:
		return nil // nothing reads those, kube-proxy neither
	case discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6:
	default:
		errs = append(errs, field.NotSupported(field.NewPath("addressType"), o.AddressType,
			[]discoveryv1.AddressType{discoveryv1.AddressTypeIPv4, discoveryv1.AddressTypeIPv6, discoveryv1.AddressTypeFQDN}))
	}
	for i, e := range o.Endpoints {
		at := field.NewPath("endpoints").Index(i).Child("addresses")
		if len(e.Addresses) == 0 {
			errs = append(errs, field.Required(at, "an endpoint has an address"))
		}
		for j, s := range e.Addresses {
			if a, err := parseAddr(s); err != nil {
				errs = append(errs, field.Invalid(at.Index(j), s, err.Error()))
			} else if a.Is4() != (o.AddressType == discoveryv1.AddressTypeIPv4) {
				errs = append(errs, field.Invalid(at.Index(j), s, fmt.Sprintf("is no %s address", o.AddressType)))
			}
		}
	}
	for i, p := range o.Ports {
		at := field.NewPath("ports").Index(i)
		if p.Port != nil {
			for _, msg := range validation.IsValidPortNum(int(*p.Port)) {
				errs = append(errs, field.Invalid(at.Child("port"), *p.Port, msg))
			}
		}
		if p.Protocol != nil {
			errs = append(errs, checkProtocol(*p.Protocol, at)...)
		}
	}
	return errs
}

// parseAddr reads an address that a pod, Service or endpoint can have.
func parseAddr(s string) (netip.Addr, error) {
	a, err := netip.ParseAddr(s)
	switch {
	case err != nil || a.Zone() != "" || a.Is4In6():
		return netip.Addr{}, fmt.Errorf("not an IP address, such as 10.64.0.7 or fd00:10:64::7")
	case a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return netip.Addr{}, fmt.Errorf("not the address of a host in a network")
	}
	return a, nil
}

func sameFamily(a, b string) bool {
	x, errX := netip.ParseAddr(a)
	y, errY := netip.ParseAddr(b)
	return errX == nil && errY == nil && x.Is4() == y.Is4()
}
