package oracle

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/verdict"
)

// Connections lists the attempts worth deciding: every pod to every pod, itself included, in each address family that both have; the
// same as plaintext where the source has a sidecar; and every pod to and from addresses outside, in particular both sides of every
// edge of an ipBlock. Each on every port that is declared or bounds a range, with its neighbours, and every protocol. The order
// depends on the World alone. Where neither end has a sidecar one port has to do: nothing is enforced there.
func (w World) Connections() []Conn {
	var list []Conn
	ports := w.ports()
	each := func(c Conn) {
		ports := ports
		if !Sidecar(c.From) && !Sidecar(c.To) {
			ports = ports[:1]
		}
		for _, c.Protocol = range verdict.Protocols {
			for _, c.Port = range ports {
				list = append(list, c)
			}
		}
	}
	outside := w.outside()
	for _, from := range w.Objects.Pods {
		for _, source := range Addresses(from) {
			for _, to := range w.Objects.Pods {
				for _, target := range Addresses(to) {
					if source.Is4() != target.Is4() {
						continue
					}
					c := Conn{From: from, FromAddr: source, To: to, ToAddr: target}
					each(c)
					if c.Plaintext = Sidecar(from); c.Plaintext && from != to {
						each(c)
					}
				}
			}
			for _, o := range outside {
				if o.Is4() == source.Is4() {
					each(Conn{From: from, FromAddr: source, ToAddr: o})
					each(Conn{FromAddr: o, To: from, ToAddr: source})
				}
			}
		}
	}
	return list
}

// Addresses are a pod's own, of both families.
func Addresses(pod *corev1.Pod) []netip.Addr {
	var list []netip.Addr
	for _, ip := range pod.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			list = append(list, a)
		}
	}
	return list
}

// ports are the declared ports and the bounds of every policy's, and each one's neighbours.
func (w World) ports() []uint16 {
	var list []uint16
	add := func(n int32) {
		for p := max(n-1, 1); p <= min(n+1, 65535); p++ {
			list = append(list, uint16(p))
		}
	}
	for _, pod := range w.Objects.Pods {
		for _, c := range slices.Concat(pod.Spec.Containers, pod.Spec.InitContainers) {
			for _, p := range c.Ports {
				list = append(list, uint16(p.ContainerPort))
			}
		}
	}
	for _, np := range w.Objects.NetworkPolicies {
		var all [][]portOf
		for _, rule := range np.Spec.Ingress {
			all = append(all, rule.Ports)
		}
		for _, rule := range np.Spec.Egress {
			all = append(all, rule.Ports)
		}
		for _, p := range slices.Concat(all...) {
			if p.Port == nil || p.Port.StrVal != "" {
				continue
			}
			add(p.Port.IntVal)
			if p.EndPort != nil {
				add(*p.EndPort)
			}
		}
	}
	if len(list) == 0 {
		list = []uint16{80}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// outside are addresses that are no pod's: the nodes, one address per family far from everything, and both sides of the edges of
// every ipBlock and exception.
func (w World) outside() []netip.Addr {
	list := []netip.Addr{netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8:ffff::9")}
	edges := func(s string) {
		if p, err := netip.ParsePrefix(s); err == nil {
			first, last := p.Masked().Addr(), last(p)
			list = append(list, first, last, first.Prev(), last.Next())
		}
	}
	for _, p := range w.PodNetwork {
		edges(p.String())
	}
	for _, np := range w.Objects.NetworkPolicies {
		for _, peer := range allPeers(np) {
			if peer.IPBlock != nil {
				edges(peer.IPBlock.CIDR)
				for _, e := range peer.IPBlock.Except {
					edges(e)
				}
			}
		}
	}
	for _, n := range w.Objects.Nodes {
		for _, a := range n.Status.Addresses {
			if addr, err := netip.ParseAddr(a.Address); err == nil {
				list = append(list, addr)
			}
		}
	}
	list = slices.DeleteFunc(list, func(a netip.Addr) bool {
		return !a.IsValid() || a.Is4In6() || a.IsUnspecified() || slices.ContainsFunc(w.Objects.Pods, func(p *corev1.Pod) bool {
			return !p.Spec.HostNetwork && slices.Contains(Addresses(p), a)
		})
	})
	slices.SortFunc(list, netip.Addr.Compare)
	return slices.Compact(list)
}

// String writes "ns0/pod1 (10.64.1.11) to ns1/pod2 (10.64.0.12) port 80/TCP".
func (c Conn) String() string {
	end := func(pod *corev1.Pod, addr netip.Addr) string {
		if pod == nil {
			return addr.String()
		}
		return fmt.Sprintf("%s/%s (%s)", pod.Namespace, pod.Name, addr)
	}
	text := fmt.Sprintf("%s to %s port %d/%s", end(c.From, c.FromAddr), end(c.To, c.ToAddr), c.Port, c.Protocol)
	if c.Plaintext {
		text += ", past the source's sidecar"
	}
	return text
}
