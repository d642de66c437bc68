package e2e

import (
	"fmt"
	"maps"
	"net/netip"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// In honest web may go to api, by address and by Service, and to 198.51.100.0/24 and 2001:db8:1::/64 but for their upper halves; api admits
// web and, from outside, 203.0.113.0/24.
const honest = `
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {selector: {app: api}, clusterIP: 10.96.3.1, clusterIPs: [10.96.3.1, "fd00:10:96::31"], ipFamilyPolicy: RequireDualStack, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {selector: {app: db}, clusterIP: 10.96.3.2, clusterIPs: [10.96.3.2, "fd00:10:96::32"], ipFamilyPolicy: RequireDualStack, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, clusterIP: 10.96.3.3, clusterIPs: [10.96.3.3, "fd00:10:96::33"], ipFamilyPolicy: RequireDualStack, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Egress]
  egress:
  - to: [{podSelector: {matchExpressions: [{key: app, operator: In, values: [api, db]}]}}]
  - to: [{ipBlock: {cidr: 198.51.100.0/24, except: [198.51.100.128/25]}}, {ipBlock: {cidr: "2001:db8:1::/64", except: ["2001:db8:1:0:8000::/65"]}}]
    ports: [{port: 443}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  podSelector: {matchLabels: {app: api}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: web}}}]
    ports: [{port: 8080}]
  - from: [{ipBlock: {cidr: 203.0.113.0/25}}]
    ports: [{port: 8080}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress]}
`

func startHonest(t *testing.T) *sandbox.Sandbox {
	t.Helper()
	var o matrix.Options
	for _, e := range []string{"198.51.100.0/24:443", "[2001:db8:1::/64]:443", "203.0.113.0/24:443"} {
		x, err := matrix.ParseExternal(e)
		if err != nil {
			t.Fatal(err)
		}
		o.External = append(o.External, x)
	}
	return start(t, manifests(t, honest), o)
}

// honestVerdicts is what the connect() of web's app has to say in honest, true: connected. inside are the destinations that its sidecar asks about, others
// those that it knows of by itself.
func honestVerdicts(t *testing.T, s *sandbox.Sandbox) (inside, others map[string]bool) {
	t.Helper()
	web, api, db := pod(t, s, "shop/web"), pod(t, s, "shop/api"), pod(t, s, "shop/db")
	inside = map[string]bool{
		addressOf(api, 0, 8080): true, addressOf(api, 1, 8080): true, "10.96.3.1:80": true, "[fd00:10:96::31]:80": true, // allowed by both ends
		addressOf(db, 0, 8080): false, addressOf(db, 1, 8080): false, "10.96.3.2:80": false, "[fd00:10:96::32]:80": false, // denied by the other end
		addressOf(api, 0, 9090): false, addressOf(api, 1, 9090): false, "10.96.3.1:81": false, // another port
		"10.96.9.9:80": false, "[fd00:10:96::99]:80": false, // nobody
		"10.96.3.3:80": true, "[fd00:10:96::33]:80": true, // itself
	}
	others = map[string]bool{
		addressOf(api, 0, 15006): false, addressOf(api, 1, 15001): false, // capture ports
		"10.244.77.77:80":  false, // nobody
		"198.51.100.7:443": true, "[2001:db8:1::7]:443": true, "198.51.100.200:443": false, "[2001:db8:1:0:8000::7]:443": false,
		"198.51.100.7:444": false, "203.0.113.9:443": false, // outside
		addressOf(web, 0, 8080): true, addressOf(web, 1, 8080): true, // itself
	}
	return inside, others
}

// addressOf is a port at a pod's address of a family, 0: IPv4.
func addressOf(p *netns.Pod, family int, port uint16) string {
	return netip.AddrPortFrom(p.Spec().IPs[family], port).String()
}

// connectSays makes one connection and holds what connect() said and whether bytes came against each other and what is wanted.
func connectSays(t *testing.T, from *netns.Pod, when, to string, allowed bool) netns.Outcome {
	t.Helper()
	a := netip.MustParseAddrPort(to)
	o := probe(t, from, a.Addr(), a.Port())
	want := "connection refused"
	if allowed {
		want = netns.Connected
	}
	if o.Connect != want || (o.Reached != "") != allowed {
		t.Errorf("%s: %s → %s: connect() says %q, want %q; answered by %q (%s)", when, from.Name(), to, o.Connect, want, o.Reached, o.Err)
	}
	return o
}

// TestConnectTellsTheTruth: what is denied is refused at the first attempt, what is allowed is accepted at the first attempt, and after a
// change the very first attempt says what is in force now; by pod address, ClusterIP and external address, over IPv4 and IPv6.
func TestConnectTellsTheTruth(t *testing.T) {
	s := startHonest(t)
	web, db := pod(t, s, "shop/web"), pod(t, s, "shop/db")
	node4, node6 := s.Network().Addresses()
	inside, others := honestVerdicts(t, s)
	want := maps.Clone(inside)
	maps.Copy(want, others)
	for round := range 2 {
		for to, allowed := range want {
			o := connectSays(t, web, fmt.Sprintf("attempt %d", round+1), to, allowed)
			if allowed {
				t.Logf("attempt %d: %s answered after %v", round+1, to, o.Elapsed.Round(10*time.Microsecond))
			}
		}
	}
	for _, node := range []netip.Addr{node4, node6} { // its own node: nobody listens there, but nobody stands in between either
		if o := probe(t, web, node, 9); o.Reached != "" || o.Bytes != 0 {
			t.Errorf("%s: %+v", node, o)
		}
	}

	// Changes: each is told at the first attempt after the ACKs, also where it had been known otherwise.
	cp := s.ControlPlane()
	tcp := intstr.FromInt32(8080)
	admitsWeb := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "db", Namespace: "shop"}, Spec: networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}},
		Ingress: []networkingv1.NetworkPolicyIngressRule{{
			From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}}},
			Ports: []networkingv1.NetworkPolicyPort{{Port: &tcp}}}}}}
	admitsNobody := admitsWeb.DeepCopy()
	admitsNobody.Spec.Ingress = nil
	other := intstr.FromInt32(443)
	outside := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "web-more", Namespace: "shop"}, Spec: networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}},
		PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		Egress: []networkingv1.NetworkPolicyEgressRule{{
			To:    []networkingv1.NetworkPolicyPeer{{IPBlock: &networkingv1.IPBlock{CIDR: "203.0.113.0/24"}}, {IPBlock: &networkingv1.IPBlock{CIDR: "2001:db8:1::/64"}}},
			Ports: []networkingv1.NetworkPolicyPort{{Port: &other}}}}}}
	dbs := []string{addressOf(db, 0, 8080), addressOf(db, 1, 8080), "10.96.3.2:80", "[fd00:10:96::32]:80"}
	outsides := []string{"203.0.113.9:443", "[2001:db8:1:0:8000::7]:443"}
	for round := range 5 {
		for _, allowed := range []bool{true, false} {
			policy, change := admitsNobody, cp.Delete
			if allowed {
				policy, change = admitsWeb, cp.Apply
			}
			if err := cp.Apply(policy); err != nil {
				t.Fatal(err)
			}
			if err := change(outside); err != nil {
				t.Fatal(err)
			}
			confirmed(t, s, "shop/web", "shop/db")
			for _, to := range append(dbs, outsides...) {
				connectSays(t, web, fmt.Sprintf("change %d", round), to, allowed)
			}
		}
	}
	for to, allowed := range want {
		connectSays(t, web, "after all", to, allowed)
	}
}
