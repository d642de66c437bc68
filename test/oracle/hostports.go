package oracle

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// HostPort is where the own node of a pod leads what that sends to one of its ports: to the pod that asks for it as a host port. It is zero where that
// has no address which is its alone. claimed is false where no pod asks for the port, or the address is none of the node.
func (w World) HostPort(client *corev1.Pod, protocol corev1.Protocol, to netip.AddrPort) (at netip.AddrPort, claimed bool) {
	if !w.atOwnNode(client, to.Addr()) {
		return at, false
	}
	type claim struct {
		pod  *corev1.Pod
		ip   string
		port int32
	}
	var claims []claim
	for _, p := range w.Objects.Pods {
		if onHost(p) || p.Spec.NodeName != client.Spec.NodeName || len(Addresses(p)) > 0 && !addressIn(p, to.Addr()).IsValid() {
			continue
		}
		for _, c := range lasting(p) {
			for _, port := range c.Ports {
				every := port.HostIP == "" || port.HostIP == "0.0.0.0" || port.HostIP == "::"
				if int(port.HostPort) == int(to.Port()) && sameProtocol(port.Protocol, protocol) && (every || port.HostIP == to.Addr().String()) {
					claims = append(claims, claim{p, port.HostIP, port.ContainerPort})
				}
			}
		}
	}
	if len(claims) == 0 {
		return at, false
	}
	address := func(text string) netip.Addr {
		a, _ := netip.ParseAddr(text)
		return a
	}
	none := func(c claim) int { // 0: it has an address
		return max(0, 1-len(Addresses(c.pod)))
	}
	first := slices.MinFunc(claims, func(a, b claim) int {
		return cmp.Or(none(a)-none(b), a.pod.CreationTimestamp.Compare(b.pod.CreationTimestamp.Time),
			strings.Compare(a.pod.Namespace+"/"+a.pod.Name, b.pod.Namespace+"/"+b.pod.Name), address(a.ip).Compare(address(b.ip)), cmp.Compare(a.port, b.port))
	})
	own := addressIn(first.pod, to.Addr())
	if !own.IsValid() || slices.ContainsFunc(w.Objects.Pods, func(p *corev1.Pod) bool { return p != first.pod && !onHost(p) && slices.Contains(Addresses(p), own) }) {
		return at, true
	}
	return netip.AddrPortFrom(own, uint16(first.port)), true
}

// atOwnNode reports whether an address is of a pod's node, and nothing else.
func (w World) atOwnNode(pod *corev1.Pod, a netip.Addr) bool {
	own := hasHostIP(pod, a)
	for _, n := range w.Objects.Nodes {
		own = own || n.Name == pod.Spec.NodeName && slices.ContainsFunc(n.Status.Addresses, func(is corev1.NodeAddress) bool { return is.Address == a.String() })
	}
	for _, p := range w.Objects.Pods {
		own = own && (onHost(p) || !slices.Contains(Addresses(p), a))
	}
	for _, s := range w.Objects.Services {
		own = own && !slices.Contains(s.Spec.ClusterIPs, a.String())
	}
	return own && pod.Spec.NodeName != ""
}

func (w World) isHostPort(c Conn) bool {
	_, claimed := w.HostPort(c.From, corev1.Protocol(c.Protocol.String()), netip.AddrPortFrom(c.ToAddr, c.Port))
	return claimed
}

func addressIn(pod *corev1.Pod, like netip.Addr) netip.Addr {
	for _, a := range Addresses(pod) {
		if a.Is4() == like.Is4() {
			return a
		}
	}
	return netip.Addr{}
}

func sameProtocol(is, want corev1.Protocol) bool {
	return cmp.Or(is, corev1.ProtocolTCP) == cmp.Or(want, corev1.ProtocolTCP)
}
