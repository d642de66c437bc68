package incluster

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// A host port of a pod is that pod, to pods on its node: whom it denies is refused, although what the node leads there may come from the node itself, which
// the pod admits. Who is admitted proves who he is. A policy that names the node's address admits nothing that is behind a host port.
func TestHostPort(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "hostport")
	p.apply(`
apiVersion: v1
kind: Pod
metadata: {name: api, labels: {app: api}}
spec: {nodeName: node2, terminationGracePeriodSeconds: 1, containers: [{name: app, ports: [{containerPort: 8080, hostPort: 8097}], SERVE}]}
`, admit("api", "web"), client("web", "nodeName: node2, "), client("neighbour", "nodeName: node2, "))
	p.ready("pod/api", "pod/web", "pod/neighbour")
	p.inForce("api")
	n, err := w.Client.CoreV1().Nodes().Get(t.Context(), "node2", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var hosts, all []string
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			hosts, all = append(hosts, a.Address), append(all, net.JoinHostPort(a.Address, "8097"))
		}
	}
	if len(all) == 0 {
		t.Fatalf("node2 has no address: %v", n.Status.Addresses)
	}
	p.eventually("admitted", "web", traffic.Reached, all...)
	p.want("denied by the pod, asked by the node that it admits", "neighbour", traffic.Refused, all...)
	err = Await(t.Context(), patience, func(ctx context.Context) error { // flows are logged when they end
		log, err := w.Cluster.Kubectl(ctx, "", "-n", p.name, "logs", "api", "-c", "mantlet-proxy")
		if err == nil && strings.Count(log, `"authenticated":true`) < len(all) {
			err = fmt.Errorf("not %d authenticated flows in the log of api's sidecar:\n%s", len(all), log)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}

	var blocks []string
	for _, h := range hosts {
		bits := 32
		if strings.Contains(h, ":") {
			bits = 128
		}
		blocks = append(blocks, fmt.Sprintf("{ipBlock: {cidr: %q}}", fmt.Sprintf("%s/%d", h, bits)))
	}
	p.apply(fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: out}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{to: [%s]}]}
`, strings.Join(blocks, ", ")))
	p.inForce("out")
	p.want("egress to the node alone", "web", traffic.Refused, all...)
}
