package incluster

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// A node port is the Service, at every node: whom the pod behind it denies is refused, also by way of the pod's own node, which it admits. Who is
// admitted proves who he is. A policy that names the node's address admits what is on the node, and nothing that the node would balance to.
func TestNodePort(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "nodeport")
	p.apply(`
apiVersion: v1
kind: Pod
metadata: {name: api, labels: {app: api}}
spec: {nodeName: node2, terminationGracePeriodSeconds: 1, containers: [{name: app, SERVE}]}
---
apiVersion: v1
kind: Service
metadata: {name: api}
spec: {type: NodePort, selector: {app: api}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: local}
spec: {type: NodePort, externalTrafficPolicy: Local, selector: {app: api}, ports: [{port: 80, targetPort: 8080}]}
`, admit("api", "web"), client("web", "nodeName: node1, "), client("other", "nodeName: node1, "), client("neighbour", "nodeName: node2, "))
	p.ready("pod/api", "pod/web", "pod/other", "pod/neighbour")
	p.inForce("api")
	at := func(node, service string) string {
		t.Helper()
		n, err := w.Client.CoreV1().Nodes().Get(t.Context(), node, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s, err := w.Client.CoreV1().Services(p.name).Get(t.Context(), service, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				return net.JoinHostPort(a.Address, strconv.Itoa(int(s.Spec.Ports[0].NodePort)))
			}
		}
		t.Fatalf("%s has no address", node)
		return ""
	}
	first, second, local := at("node1", "api"), at("node2", "api"), at("node2", "local")
	p.eventually("admitted", "web", traffic.Reached, first, second, local)
	for _, from := range []string{"other", "neighbour"} {
		p.want("denied by the pod, asked by nodes that it admits", from, traffic.Refused, first, second, local)
	}
	p.want("a node without an endpoint, of traffic that stays on the node", "web", traffic.Refused, at("node1", "local"))
	err := Await(t.Context(), patience, func(ctx context.Context) error { // flows are logged when they end
		log, err := w.Cluster.Kubectl(ctx, "", "-n", p.name, "logs", "api", "-c", "mantlet-proxy")
		if err == nil && strings.Count(log, `"authenticated":true`) < 3 {
			err = fmt.Errorf("not three authenticated flows in the log of api's sidecar:\n%s", log)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}

	host, _, _ := net.SplitHostPort(second)
	p.apply(fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: out}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: %s/32}}]}]}
`, host))
	p.inForce("out")
	p.want("egress to the node alone", "web", traffic.Refused, second)
}
