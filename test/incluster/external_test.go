package incluster

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// An external address is the Service, at its ports, be it nobody's, a node's, or a load balancer's: whom the pod behind it denies is refused, also by way
// of the pod's own node, which it admits and which would balance there with its own address. A policy that names the address admits nothing that is
// behind it. No Service takes it from one that has it.
func TestExternalAddresses(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "external")
	n, err := w.Client.CoreV1().Nodes().Get(t.Context(), "node2", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	internal := slices.IndexFunc(n.Status.Addresses, func(a corev1.NodeAddress) bool {
		return a.Type == corev1.NodeInternalIP && !strings.Contains(a.Address, ":") // the Services have cluster IPs of IPv4 alone
	})
	if internal < 0 {
		t.Fatalf("node2 has no IPv4 address: %v", n.Status.Addresses)
	}
	node := n.Status.Addresses[internal].Address
	p.apply(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: api, labels: {app: api}}
spec: {nodeName: node2, terminationGracePeriodSeconds: 1, containers: [{name: app, SERVE}]}
---
apiVersion: v1
kind: Service
metadata: {name: api}
spec: {selector: {app: api}, externalIPs: [203.0.113.10, %q], ports: [{port: 8099, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: balanced}
spec: {type: LoadBalancer, externalTrafficPolicy: Local, selector: {app: api}, ports: [{port: 80, targetPort: 8080}]}
`, node), admit("api", "web"), client("web", "nodeName: node1, "), client("other", "nodeName: node1, "), client("neighbour", "nodeName: node2, "))
	p.ready("pod/api", "pod/web", "pod/other", "pod/neighbour")
	balanced, err := w.Client.CoreV1().Services(p.name).Get(t.Context(), "balanced", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	balanced.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "203.0.113.11"}}
	if _, err := w.Client.CoreV1().Services(p.name).UpdateStatus(t.Context(), balanced, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	p.inForce("api")
	all := []string{"203.0.113.10:8099", net.JoinHostPort(node, "8099"), "203.0.113.11:80"}
	p.eventually("admitted", "web", traffic.Reached, all...)
	for _, from := range []string{"other", "neighbour"} {
		p.want("denied by the pod, asked by nodes that it admits", from, traffic.Refused, all...)
	}

	p.apply(`
apiVersion: v1
kind: Pod
metadata: {name: thief, labels: {app: thief}}
spec: {nodeName: node1, terminationGracePeriodSeconds: 1, containers: [{name: app, SERVE}]}
---
apiVersion: v1
kind: Service
metadata: {name: thief}
spec: {selector: {app: thief}, externalIPs: [203.0.113.10, 203.0.113.11, 203.0.113.12], ports: [{name: a, port: 8099, targetPort: 8080}, {name: b, port: 80, targetPort: 8080}]}
`)
	p.ready("pod/thief")
	p.eventually("what nobody had", "other", traffic.Reached, "203.0.113.12:80")
	p.want("what another service has", "other", traffic.Refused, "203.0.113.10:8099", "203.0.113.11:80")
	p.want("what another service has", "web", traffic.Reached, "203.0.113.10:8099", "203.0.113.11:80")

	p.apply(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: out}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 203.0.113.0/24}}]}]}
`)
	p.inForce("out")
	p.want("egress to the address alone", "web", traffic.Refused, "203.0.113.10:8099", "203.0.113.11:80")
}
