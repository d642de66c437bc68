package policy

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/verdict"
)

// netpol is a parsed NetworkPolicy.
type netpol struct {
	Held             // but for Pods and Problems
	key       string // "namespace/name"
	namespace string
	pods      *selector
	ingress   direction
	egress    direction
	problems  []string
}

// direction is one side of a policy.
type direction struct {
	isolates bool
	rules    []rule
}

// rule is one ingress or egress rule.
type rule struct {
	name      string // "ingress[0]"
	anyone    bool   // no peers listed: matches everybody
	selectors []*peerSelector
	blocks    []ipBlock
	ports     rulePorts
	peersText string
}

// ipBlock is a NetworkPolicyPeer with an ipBlock.
type ipBlock struct {
	cidr   netip.Prefix
	except []netip.Prefix
}

func (b *ipBlock) contains(a netip.Addr) bool {
	if !b.cidr.Contains(a) {
		return false
	}
	for _, e := range b.except {
		if e.Contains(a) {
			return false
		}
	}
	return true
}

// ruleOf finds the rule in the path of a field.
var ruleOf = regexp.MustCompile(`^spec\.((?:ingress|egress)\[\d+\])`)

// parsePolicy reads a NetworkPolicy so that whatever is wrong in it closes instead of opening: a broken podSelector selects the
// whole namespace, a broken rule admits nothing.
func parsePolicy(np *networkingv1.NetworkPolicy) *netpol {
	p := &netpol{key: np.Namespace + "/" + np.Name, namespace: np.Namespace}
	p.Held = Held{Name: p.key, UID: string(np.UID), Generation: np.Generation, Created: np.CreationTimestamp.Time}
	broken := map[string]bool{} // "ingress[0]"
	for _, e := range Validate(np) {
		p.problems = append(p.problems, e.Error())
		if m := ruleOf.FindStringSubmatch(e.Field); m != nil {
			broken[m[1]] = true
		}
	}
	var err error
	if p.pods, err = parseSelector(&np.Spec.PodSelector); err != nil {
		p.pods, _ = parseSelector(&metav1.LabelSelector{})
	}
	p.ingress.isolates, p.egress.isolates = directions(&np.Spec)
	if p.ingress.isolates {
		for i := range np.Spec.Ingress {
			r := &np.Spec.Ingress[i]
			p.ingress.rules = append(p.ingress.rules, p.parseRule(fmt.Sprintf("ingress[%d]", i), r.From, r.Ports))
		}
	}
	if p.egress.isolates {
		for i := range np.Spec.Egress {
			r := &np.Spec.Egress[i]
			p.egress.rules = append(p.egress.rules, p.parseRule(fmt.Sprintf("egress[%d]", i), r.To, r.Ports))
		}
	}
	p.ingress.void(broken)
	p.egress.void(broken)
	return p
}

// void takes what they admit from the rules in which something is wrong: all of it, because what a person meant by a rule of which a
// part is missing nobody knows.
func (d *direction) void(broken map[string]bool) {
	for i := range d.rules {
		if name := d.rules[i].name; broken[name] {
			d.rules[i] = rule{name: name, ports: rulePorts{fixed: &portSet{}}, peersText: "nobody: the rule is invalid"}
		}
	}
}

// directions applies the defaulting of policyTypes: absent means Ingress, and Egress where there are egress rules
// (NetworkPolicySpec.policyTypes). An unknown type isolates both ways.
func directions(spec *networkingv1.NetworkPolicySpec) (ingress, egress bool) {
	if len(spec.PolicyTypes) == 0 {
		return true, len(spec.Egress) > 0
	}
	for _, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			ingress = true
		case networkingv1.PolicyTypeEgress:
			egress = true
		default:
			return true, true
		}
	}
	return ingress, egress
}

func (p *netpol) parseRule(name string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) rule {
	r := rule{name: name, ports: parsePorts(ports)}
	if len(peers) == 0 {
		r.anyone, r.peersText = true, "anyone"
		return r
	}
	var words []string
	for i := range peers {
		peer := &peers[i]
		switch {
		case peer.IPBlock != nil && peer.PodSelector == nil && peer.NamespaceSelector == nil:
			b, err := parseBlock(peer.IPBlock)
			if err != nil { // admits nothing; Validate has named it
				continue
			}
			r.blocks = append(r.blocks, b)
			words = append(words, b.String())
		case peer.IPBlock == nil && (peer.PodSelector != nil || peer.NamespaceSelector != nil):
			s, err := newPeerSelector(p.namespace, peer.NamespaceSelector, peer.PodSelector)
			if err != nil {
				continue
			}
			r.selectors = append(r.selectors, s)
			words = append(words, s.text)
		}
	}
	r.peersText = strings.Join(words, " or ")
	return r
}

func parseBlock(b *networkingv1.IPBlock) (ipBlock, error) {
	cidr, err := parsePrefix(b.CIDR)
	if err != nil {
		return ipBlock{}, err
	}
	out := ipBlock{cidr: cidr}
	for _, s := range b.Except {
		e, err := parsePrefix(s)
		if err != nil {
			return ipBlock{}, err // an exception that cannot be read must not open what it was to close
		}
		out.except = append(out.except, e)
	}
	return out, nil
}

func parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, err
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%s is an IPv4-mapped prefix", s)
	}
	return p.Masked(), nil
}

func (b *ipBlock) String() string {
	s := "ipBlock " + b.cidr.String()
	for i, e := range b.except {
		if i == 0 {
			s += " except "
		} else {
			s += ", "
		}
		s += e.String()
	}
	return s
}

// describe words the rule; pod holds the ports of the pod that its port names speak of, where that is one pod.
func (r *rule) describe(policy string, pod []namedPort) verdict.Rule {
	return verdict.Rule{Policy: policy, Rule: r.name, Peers: r.peersText, Ports: r.ports.describe(pod)}
}

// admits is the reason that an entry of the rule gives.
func admits(r verdict.Rule) verdict.Reason {
	return verdict.Reason{Policy: r.Policy, Rule: r.Rule, Text: fmt.Sprintf("%s of %s admits %s on %s", r.Rule, r.Policy, r.Peers, r.Ports)}
}
