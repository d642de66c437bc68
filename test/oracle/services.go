package oracle

import (
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// ExternalService is the Service that a port of an address is an external one of: of spec.externalIPs, or of a load balancer that is no proxy. It is nil
// where there is none, and where the address is a pod's or a cluster IP. Of several it is one that a load balancer gave the address to, then the oldest.
func (w World) ExternalService(protocol corev1.Protocol, to netip.AddrPort) *corev1.Service {
	for _, p := range w.Objects.Pods {
		if !onHost(p) && slices.Contains(Addresses(p), to.Addr()) {
			return nil
		}
	}
	var given, named []*corev1.Service
	for _, s := range w.Objects.Services {
		if slices.Contains(s.Spec.ClusterIPs, to.Addr().String()) {
			return nil
		}
		family := slices.ContainsFunc(s.Spec.ClusterIPs, func(ip string) bool {
			return ip != corev1.ClusterIPNone && strings.Contains(ip, ":") == to.Addr().Is6()
		})
		if !family || !slices.ContainsFunc(s.Spec.Ports, func(p corev1.ServicePort) bool {
			return uint16(p.Port) == to.Port() && (p.Protocol == protocol || p.Protocol == "" && protocol == corev1.ProtocolTCP)
		}) {
			continue
		}
		if balanced(s, to.Addr()) {
			given = append(given, s)
		} else if slices.Contains(s.Spec.ExternalIPs, to.Addr().String()) {
			named = append(named, s)
		}
	}
	for _, list := range [][]*corev1.Service{given, named} {
		if len(list) > 0 {
			return slices.MinFunc(list, func(a, b *corev1.Service) int {
				if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
					return c
				}
				return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
			})
		}
	}
	return nil
}

// balanced reports whether a load balancer gave a Service an address, and sends on what comes there as it comes.
func balanced(s *corev1.Service, a netip.Addr) bool {
	return slices.ContainsFunc(s.Status.LoadBalancer.Ingress, func(in corev1.LoadBalancerIngress) bool {
		return in.IP == a.String() && (in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP)
	})
}

// MayCome reports whether a pod may use a Service at an external address, as far as spec.loadBalancerSourceRanges says.
func MayCome(pod *corev1.Pod, s *corev1.Service, to netip.Addr) bool {
	limited := false
	for _, text := range s.Spec.LoadBalancerSourceRanges {
		n, err := netip.ParsePrefix(text)
		if err != nil || n.Addr().Is4() != to.Is4() {
			continue
		}
		limited = true
		if slices.ContainsFunc(Addresses(pod), n.Contains) {
			return true
		}
	}
	return !limited || !balanced(s, to)
}
