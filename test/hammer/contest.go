package hammer

import (
	"fmt"
	"math/rand/v2"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Contestants are the pods of Contested that try.
var Contestants = []string{"shop/always", "shop/never", "shop/a", "shop/seesaw", "legacy/plain"}

// ContestedVIP is the address of the Service of s1.
const ContestedVIP = "10.96.3.3"

// Contested has two servers and those who want to reach them. The policies are those of a Contest.
const Contested = `
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: legacy}}
---
{apiVersion: v1, kind: Pod, metadata: {name: s1, namespace: shop, labels: {app: s1}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: s2, namespace: shop, labels: {app: s2}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: always, namespace: shop, labels: {app: always}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: never, namespace: shop, labels: {app: never}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: a}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: seesaw, namespace: shop, labels: {app: seesaw}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: plain, namespace: legacy, labels: {app: plain}}, spec: {containers: [{name: c, image: i}]}}
---
apiVersion: v1
kind: Service
metadata: {name: s1, namespace: shop}
spec:
  selector: {app: s1}
  clusterIP: ` + ContestedVIP + `
  ports: [{name: tcp, port: 80, targetPort: 8080}, {name: udp, protocol: UDP, port: 80, targetPort: 8080}]
`

// Contest makes random states of policy between which:
//   - always may reach both servers, by ever other policies;
//   - never may reach none;
//   - seesaw may not reach s1 either: when s1 admits it, its own egress forbids it, and when its egress permits it, s1 does not admit it;
//     both change in one edit;
//   - a and plain may reach what chance allows.
//
// s2 is isolated by one policy at a time, each with another name: between taking one out and putting the next in anybody could get in.
type Contest struct {
	rand *rand.Rand
	n    int
	// The present state.
	extra, s2                      map[string][]port // who is admitted besides always, and to which ports
	tilted                         bool              // seesaw's egress permits s1
	aOut                           string            // to which server alone a may go; "": no egress policy
	s2Generation, alwaysGeneration int
}

// NewContest begins with a state in which nobody but always is admitted.
func NewContest(r *rand.Rand) *Contest {
	return &Contest{rand: r, extra: map[string][]port{}, s2: map[string][]port{}}
}

// Edit changes one or two things.
func (c *Contest) Edit() {
	c.n++
	for range 1 + c.rand.IntN(2) {
		switch c.rand.IntN(5) {
		case 0:
			c.extra = c.admitted()
		case 1:
			c.s2, c.s2Generation = c.admitted(), c.n
		case 2:
			c.tilted = !c.tilted
		case 3:
			c.aOut = []string{"", "s1", "s2"}[c.rand.IntN(3)]
		case 4:
			c.alwaysGeneration = c.n
		}
	}
}

// port is one that a policy names.
type port struct {
	number   int32
	protocol corev1.Protocol
}

func (c *Contest) admitted() map[string][]port {
	out := map[string][]port{}
	for _, who := range []string{"a", "plain"} {
		for _, number := range []int32{8080, 9090} {
			for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
				if c.rand.IntN(2) == 0 {
					out[who] = append(out[who], port{number, protocol})
				}
			}
		}
	}
	return out
}

// Policies are those of the present state.
func (c *Contest) Policies() []*networkingv1.NetworkPolicy {
	base := ingress("s1-base", "s1", admit("always"))
	extra := ingress("s1-extra", "s1")
	s2 := ingress(fmt.Sprintf("s2-%d", c.s2Generation), "s2", admit("always"))
	for _, who := range []string{"a", "plain"} {
		if ports := c.extra[who]; len(ports) > 0 {
			extra.Spec.Ingress = append(extra.Spec.Ingress, admit(who, ports...))
		}
		if ports := c.s2[who]; len(ports) > 0 {
			s2.Spec.Ingress = append(s2.Spec.Ingress, admit(who, ports...))
		}
	}
	seesaw := egress("seesaw-out", "seesaw", "s2")
	if c.tilted {
		seesaw = egress("seesaw-out", "seesaw", "s1")
	} else {
		extra.Spec.Ingress = append(extra.Spec.Ingress, admit("seesaw"))
	}
	out := []*networkingv1.NetworkPolicy{base, extra, s2, seesaw, egress(fmt.Sprintf("always-out-%d", c.alwaysGeneration), "always", "s1", "s2")}
	if c.aOut != "" {
		out = append(out, egress("a-out", "a", c.aOut))
	}
	return out
}

func ingress(name, app string, rules ...networkingv1.NetworkPolicyIngressRule) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: *labelled(app), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}, Ingress: rules,
		},
	}
}

func egress(name, app string, to ...string) *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "shop"},
		Spec:       networkingv1.NetworkPolicySpec{PodSelector: *labelled(app), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}},
	}
	for _, app := range to {
		np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: []networkingv1.NetworkPolicyPeer{{PodSelector: labelled(app)}}})
	}
	return np
}

func admit(app string, ports ...port) networkingv1.NetworkPolicyIngressRule {
	r := networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{{PodSelector: labelled(app), NamespaceSelector: &metav1.LabelSelector{}}}}
	for _, p := range ports {
		r.Ports = append(r.Ports, networkingv1.NetworkPolicyPort{Port: new(intstr.FromInt32(p.number)), Protocol: &p.protocol})
	}
	return r
}

func labelled(app string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}
}
