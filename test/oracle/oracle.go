// Package oracle is a second opinion on every verdict, deliberately dumb: it reads the API objects anew for each connection and
// shares nothing with the compiler but the object types. Where the two differ, one of them is wrong.
//
//	Generate(seed) ──► World ──┬─► World.Allowed(Conn)             the oracle's answer
//	                           └─► compiler, Envoy config, sandbox  the answers that must be the same
//	World.Connections ──► []Conn      Shrink ──► a smaller World that still fails      World.YAML ──► manifests
//
// The rules are those of the Kubernetes API text (k8s.io/api/networking/v1, types.go) and, for who enforces and which plaintext is
// accepted, of the design. The protocol makes no difference to who is recognised: a UDP peer is told by its address, and an address
// is as good here as a certificate.
package oracle

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
)

// World is a cluster at one time.
type World struct {
	Objects    policy.Objects
	PodNetwork []netip.Prefix // the ranges that pod addresses come from
	Mode       verdict.Mode   // of namespaces without policy.ModeLabel
}

// Conn is one attempt to connect, after service load balancing.
type Conn struct {
	From      *corev1.Pod // nil: outside
	FromAddr  netip.Addr
	To        *corev1.Pod // nil: outside
	ToAddr    netip.Addr
	Port      uint16 // at the destination
	Protocol  verdict.Protocol
	Plaintext bool // the source has a sidecar, and its app slips past it
}

// Allowed says whether the connection comes about, and names what decides.
func (w World) Allowed(c Conn) (bool, string) {
	c = c.asPolicySees()
	guarded, guarding := Sidecar(c.From) && !c.Plaintext, Sidecar(c.To)
	switch {
	case samePod(c.From, c.To):
		return true, "a pod to itself"
	case guarded && c.To == nil && w.ExternalService(corev1.Protocol(c.Protocol.String()), netip.AddrPortFrom(c.ToAddr, c.Port)) != nil:
		return false, "a service's external address: a node would balance once more"
	case guarded && c.To == nil && w.isHostPort(c):
		return false, "a host port: the node would lead on to a pod"
	case c.To != nil && hasHostIP(c.To, c.FromAddr):
		return true, "from the destination's own node"
	case c.From != nil && hasHostIP(c.From, c.ToAddr):
		return true, "to the source's own node"
	case !guarded && !guarding:
		return true, "no sidecar on the way: nothing is enforced"
	case guarded: // both policies at the source; at a destination with a sidecar this is mTLS, and the same once more
		if ok, why := w.Egress(c); !ok {
			return false, why
		}
		return w.Ingress(c)
	}
	return w.plaintext(c)
}

// asPolicySees takes pods on the host's network for what they are to NetworkPolicy: addresses of nodes, and no pods.
func (c Conn) asPolicySees() Conn {
	if onHost(c.From) {
		c.From = nil
	}
	if onHost(c.To) {
		c.To = nil
	}
	return c
}

// plaintext decides at a destination with a sidecar on a peer that shows no certificate.
func (w World) plaintext(c Conn) (bool, string) {
	strict := w.mode(c.To) == verdict.Strict
	isolated := len(w.Isolating(c.To, networkingv1.PolicyTypeIngress)) > 0
	inside := slices.ContainsFunc(w.PodNetwork, func(p netip.Prefix) bool { return p.Contains(c.FromAddr) })
	switch {
	case !isolated && strict:
		return false, "plaintext at a strict workload"
	case !isolated:
		return true, "no policy isolates the destination, and it is permissive"
	case Sidecar(c.From):
		return false, "plaintext at an isolated workload from a pod that has a sidecar"
	case strict && inside:
		return false, "plaintext at a strict workload from inside the pod network"
	case c.From == nil && inside:
		return false, "from an address in the pod network that is no pod's"
	}
	if ok, why := w.Egress(c); !ok { // of a pod whose own sidecar, if any, did not see the connection
		return false, why
	}
	if strict {
		return w.ingressBy(c, blocksOnly)
	}
	return w.Ingress(c)
}

// Ingress is the destination's ingress policy alone. A destination outside has none.
func (w World) Ingress(c Conn) (bool, string) { return w.ingressBy(c, anything) }

// Egress is the source's egress policy alone. A source outside has none.
func (w World) Egress(c Conn) (bool, string) {
	c = c.asPolicySees()
	isolating := w.Isolating(c.From, networkingv1.PolicyTypeEgress)
	if len(isolating) == 0 {
		return true, "no policy isolates the source for egress"
	}
	for _, np := range isolating {
		for i, rule := range np.Spec.Egress {
			if portMatches(rule.Ports, c) && w.peerMatches(np, rule.To, c.To, c.ToAddr, anything) {
				return true, fmt.Sprintf("%s/%s egress[%d]", np.Namespace, np.Name, i)
			}
		}
	}
	return false, "no egress rule of " + names(isolating)
}

func (w World) ingressBy(c Conn, by evidence) (bool, string) {
	c = c.asPolicySees()
	isolating := w.Isolating(c.To, networkingv1.PolicyTypeIngress)
	if len(isolating) == 0 {
		return true, "no policy isolates the destination for ingress"
	}
	for _, np := range isolating {
		for i, rule := range np.Spec.Ingress {
			if portMatches(rule.Ports, c) && w.peerMatches(np, rule.From, c.From, c.FromAddr, by) {
				return true, fmt.Sprintf("%s/%s ingress[%d]", np.Namespace, np.Name, i)
			}
		}
	}
	return false, "no ingress rule of " + names(isolating)
}

// Isolating returns the policies that isolate a pod in a direction.
func (w World) Isolating(pod *corev1.Pod, direction networkingv1.PolicyType) []*networkingv1.NetworkPolicy {
	var isolating []*networkingv1.NetworkPolicy
	for _, np := range w.Objects.NetworkPolicies {
		if pod == nil || onHost(pod) || np.Namespace != pod.Namespace || !matches(&np.Spec.PodSelector, pod.Labels) {
			continue
		}
		types := np.Spec.PolicyTypes
		if len(types) == 0 { // absent and empty are the same, and so are an absent and an empty egress section
			types = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
			if len(np.Spec.Egress) > 0 {
				types = append(types, networkingv1.PolicyTypeEgress)
			}
		}
		if slices.Contains(types, direction) {
			isolating = append(isolating, np)
		}
	}
	return isolating
}

// evidence is what may speak for a peer.
type evidence int

const (
	anything   evidence = iota
	blocksOnly          // an ipBlock that names the address; nothing that means anyone
)

// peerMatches reports whether a rule's from or to list holds the peer; pod is nil for an address that is no pod's.
func (w World) peerMatches(np *networkingv1.NetworkPolicy, peers []networkingv1.NetworkPolicyPeer, pod *corev1.Pod, addr netip.Addr, by evidence) bool {
	if len(peers) == 0 {
		return by == anything
	}
	for _, peer := range peers {
		switch {
		case peer.IPBlock != nil:
			if inBlock(peer.IPBlock, addr) {
				return true
			}
		case by == blocksOnly || pod == nil:
		case peer.NamespaceSelector == nil && pod.Namespace != np.Namespace:
		case peer.NamespaceSelector != nil && !matches(peer.NamespaceSelector, w.namespaceLabels(pod.Namespace)):
		case peer.PodSelector != nil && !matches(peer.PodSelector, pod.Labels):
		case peer.PodSelector == nil && peer.NamespaceSelector == nil: // the API refuses such a peer; it names nobody
		default:
			return true
		}
	}
	return false
}

func inBlock(b *networkingv1.IPBlock, addr netip.Addr) bool {
	cidr, err := netip.ParsePrefix(b.CIDR)
	if err != nil || !cidr.Contains(addr.Unmap()) {
		return false
	}
	for _, e := range b.Except {
		if except, err := netip.ParsePrefix(e); err != nil || except.Contains(addr.Unmap()) {
			return false
		}
	}
	return true
}

// portMatches reports whether a rule's ports hold the connection's. No list is every port of every protocol.
func portMatches(ports []networkingv1.NetworkPolicyPort, c Conn) bool {
	for _, p := range ports {
		protocol := corev1.ProtocolTCP
		if p.Protocol != nil {
			protocol = *p.Protocol
		}
		if string(protocol) != c.Protocol.String() {
			continue
		}
		switch {
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.String:
			if resolves(p.Port.StrVal, c) {
				return true
			}
		case p.EndPort == nil && int(p.Port.IntVal) == int(c.Port):
			return true
		case p.EndPort != nil && int(p.Port.IntVal) <= int(c.Port) && int(c.Port) <= int(*p.EndPort):
			return true
		}
	}
	return len(ports) == 0
}

// resolves reports whether a named port is the connection's port at its destination pod.
func resolves(name string, c Conn) bool {
	if c.To == nil {
		return false
	}
	for _, container := range lasting(c.To) {
		for _, port := range container.Ports {
			protocol := string(port.Protocol)
			if protocol == "" {
				protocol = string(corev1.ProtocolTCP)
			}
			if port.Name == name && protocol == c.Protocol.String() && int(port.ContainerPort) == int(c.Port) {
				return true
			}
		}
	}
	return false
}

// lasting are the containers that run as long as the pod does.
func lasting(pod *corev1.Pod) []corev1.Container {
	containers := slices.Clone(pod.Spec.Containers)
	for _, init := range pod.Spec.InitContainers {
		if init.RestartPolicy != nil && *init.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			containers = append(containers, init)
		}
	}
	return containers
}

// matches is a label selector: all of matchLabels and all of matchExpressions. NotIn holds where the key is absent.
func matches(s *metav1.LabelSelector, labels map[string]string) bool {
	for k, want := range s.MatchLabels {
		if got, ok := labels[k]; !ok || got != want {
			return false
		}
	}
	for _, e := range s.MatchExpressions {
		got, ok := labels[e.Key]
		holds := false
		switch e.Operator {
		case metav1.LabelSelectorOpIn:
			holds = ok && slices.Contains(e.Values, got)
		case metav1.LabelSelectorOpNotIn:
			holds = !ok || !slices.Contains(e.Values, got)
		case metav1.LabelSelectorOpExists:
			holds = ok
		case metav1.LabelSelectorOpDoesNotExist:
			holds = !ok
		}
		if !holds {
			return false
		}
	}
	return true
}

func (w World) namespaceLabels(name string) map[string]string {
	for _, ns := range w.Objects.Namespaces {
		if ns.Name == name {
			return ns.Labels
		}
	}
	return nil
}

func (w World) mode(pod *corev1.Pod) verdict.Mode {
	if m, ok := w.namespaceLabels(pod.Namespace)[policy.ModeLabel]; ok {
		mode, err := verdict.ParseMode(m)
		if err != nil {
			return verdict.Strict // unreadable: the safe one
		}
		return mode
	}
	return w.Mode
}

// Sidecar reports whether a pod has a sidecar. No pod has none.
func Sidecar(pod *corev1.Pod) bool {
	return pod != nil && pod.Annotations[policy.SidecarAnnotation] == policy.SidecarInjected
}

func onHost(pod *corev1.Pod) bool { return pod != nil && pod.Spec.HostNetwork }

func samePod(a, b *corev1.Pod) bool {
	return a != nil && b != nil && a.Namespace == b.Namespace && a.Name == b.Name
}

func hasHostIP(pod *corev1.Pod, addr netip.Addr) bool {
	return slices.ContainsFunc(pod.Status.HostIPs, func(h corev1.HostIP) bool {
		ip, err := netip.ParseAddr(h.IP)
		return err == nil && ip == addr
	})
}

func names(policies []*networkingv1.NetworkPolicy) string {
	text := ""
	for i, np := range policies {
		if i > 0 {
			text += ", "
		}
		text += np.Namespace + "/" + np.Name
	}
	return text
}
