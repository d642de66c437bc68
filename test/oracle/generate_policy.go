package oracle

import (
	"fmt"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// policy adds one NetworkPolicy that the API would accept.
func (g *generator) policy(i int) {
	np := &networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("np%d", i), Namespace: pick(g.Rand, g.Objects.Namespaces).Name},
	}
	np.Spec.PodSelector = g.podSelector()
	both := []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	np.Spec.PolicyTypes = pick(g.Rand, [][]networkingv1.PolicyType{nil, {}, both[:1], both[1:], both, both})
	if g.chance(80) {
		np.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{}
		for range g.IntN(4) {
			np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: g.peers(), Ports: g.ports()})
		}
	}
	if g.chance(60) {
		np.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{}
		for range g.IntN(4) {
			np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: g.peers(), Ports: g.ports()})
		}
	}
	g.Objects.NetworkPolicies = append(g.Objects.NetworkPolicies, np)
}

func (g *generator) peers() []networkingv1.NetworkPolicyPeer {
	if g.chance(15) {
		return pick(g.Rand, [][]networkingv1.NetworkPolicyPeer{nil, {}})
	}
	var peers []networkingv1.NetworkPolicyPeer
	for range 1 + g.IntN(3) {
		var peer networkingv1.NetworkPolicyPeer
		kind := g.IntN(10)
		if kind < 3 {
			peer.IPBlock = g.block()
		}
		if kind >= 3 && kind < 8 {
			s := g.podSelector()
			peer.PodSelector = &s
		}
		if kind >= 6 {
			s := g.namespaceSelector()
			peer.NamespaceSelector = &s
		}
		peers = append(peers, peer)
	}
	return peers
}

func (g *generator) podSelector() metav1.LabelSelector {
	if g.chance(20) {
		return metav1.LabelSelector{}
	}
	s := g.selector(labelKeys)
	if g.chance(15) {
		values := []string{"pod0", "pod1", "pod2"}
		key := volatileName
		if g.chance(30) {
			key, values = volatileHash, []string{"r1", "r2"}
		}
		if g.chance(50) {
			s.MatchLabels = map[string]string{key: pick(g.Rand, values)}
		} else {
			s.MatchExpressions = append(s.MatchExpressions, g.expression(key, values))
		}
	}
	return s
}

func (g *generator) namespaceSelector() metav1.LabelSelector {
	switch g.IntN(4) {
	case 0:
		return metav1.LabelSelector{}
	case 1:
		return metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: pick(g.Rand, g.Objects.Namespaces).Name}}
	}
	return g.selector([]string{"team"})
}

func (g *generator) selector(keys []string) metav1.LabelSelector {
	var s metav1.LabelSelector
	for _, k := range keys {
		if g.chance(45) {
			if s.MatchLabels == nil {
				s.MatchLabels = map[string]string{}
			}
			s.MatchLabels[k] = pick(g.Rand, labelValues)
		}
		if g.chance(35) {
			s.MatchExpressions = append(s.MatchExpressions, g.expression(k, labelValues))
		}
	}
	return s
}

func (g *generator) expression(key string, values []string) metav1.LabelSelectorRequirement {
	e := metav1.LabelSelectorRequirement{Key: key, Operator: pick(g.Rand, []metav1.LabelSelectorOperator{
		metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist})}
	if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
		e.Values = append(e.Values, values[g.IntN(len(values))])
		if g.chance(40) {
			e.Values = append(e.Values, values[g.IntN(len(values))])
		}
	}
	return e
}

func (g *generator) ports() []networkingv1.NetworkPolicyPort {
	if g.chance(30) {
		return pick(g.Rand, [][]networkingv1.NetworkPolicyPort{nil, {}})
	}
	var ports []networkingv1.NetworkPolicyPort
	for range 1 + g.IntN(3) {
		var p networkingv1.NetworkPolicyPort
		if g.chance(60) {
			protocol := pick(g.Rand, protocols)
			p.Protocol = &protocol
		}
		number := pick(g.Rand, portNumbers)
		port := intstr.FromInt32(number)
		switch g.IntN(10) {
		case 0: // every port of the protocol
		case 1, 2, 3:
			port = intstr.FromString(pick(g.Rand, portNames))
			p.Port = &port
		case 4, 5, 6: // ranges that touch, overlap, hold one port, or end at the last one
			end := number + pick(g.Rand, []int32{0, 1, 2, 400, 65535 - number})
			p.Port, p.EndPort = &port, &end
		default:
			p.Port = &port
		}
		ports = append(ports, p)
	}
	return ports
}

// blocks are what ipBlocks are made of: around and inside the pod network, outside it, everything, and one with host bits set.
var blocks = []string{
	"0.0.0.0/0", "10.0.0.0/8", "10.64.0.0/16", "10.64.1.0/24", "10.64.0.0/27", "10.64.1.77/20", "198.51.100.0/24", "198.51.100.128/25", "172.18.0.0/16",
	"::/0", "fd00:10:64::/64", "fd00:10:64::1:0/112", "2001:db8::/32", "2001:db8:1::/48", "fd00:172:18::/64",
}

func (g *generator) block() *networkingv1.IPBlock {
	b := &networkingv1.IPBlock{CIDR: pick(g.Rand, blocks)}
	if g.chance(25) {
		b.CIDR = g.onePod().String()
	}
	cidr := netip.MustParsePrefix(b.CIDR)
	candidates := []netip.Prefix{g.onePod(), g.onePod()}
	for _, s := range blocks {
		candidates = append(candidates, netip.MustParsePrefix(s))
	}
	lower := netip.PrefixFrom(cidr.Masked().Addr(), min(cidr.Bits()+1, cidr.Addr().BitLen()))
	candidates = append(candidates, lower, netip.PrefixFrom(last(lower).Next(), lower.Bits())) // the two halves
	g.Shuffle(len(candidates), func(i, j int) { candidates[i], candidates[j] = candidates[j], candidates[i] })
	for _, c := range candidates {
		// the API wants an exception to be truly smaller than the block
		if c.IsValid() && cidr.Masked().Contains(c.Addr()) && c.Bits() > cidr.Bits() && len(b.Except) < 3 && g.chance(40) {
			b.Except = append(b.Except, c.String())
		}
	}
	return b
}

// onePod is the address of some pod, alone.
func (g *generator) onePod() netip.Prefix {
	ips := pick(g.Rand, g.Objects.Pods).Status.PodIPs
	addr := netip.MustParseAddr(ips[g.IntN(len(ips))].IP)
	return netip.PrefixFrom(addr, addr.BitLen())
}

// last is the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	bytes := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < len(bytes)*8; bit++ {
		bytes[bit/8] |= 0x80 >> (bit % 8)
	}
	addr, _ := netip.AddrFromSlice(bytes)
	return addr
}
