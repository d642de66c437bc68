package incluster

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// A namespace's labels decide who its pods are to policies: written and taken away while the pods run.
func TestNamespaceRelabel(t *testing.T) {
	w := extra(t)
	t.Parallel()
	p, from := newPlace(t, w, "relabel"), newPlace(t, w, "relabel-from")
	p.apply(server("api", 1), `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: api}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: [{namespaceSelector: {matchLabels: {team: blue}}}]}]}
`)
	from.apply(client("web", ""))
	p.ready("deployment/api")
	from.ready("pod/web")
	to := []string{p.direct("api"), p.service("api")}
	from.want("the namespace has no label", "web", traffic.Refused, to...)
	for range 2 {
		from.kubectl("label", "namespace", from.name, "team=blue")
		from.eventually("the namespace has the label", "web", traffic.Reached, to...)
		from.kubectl("label", "namespace", from.name, "team-")
		from.eventually("the namespace has the label no more", "web", traffic.Refused, to...)
	}
}

// The address of a pod that was admitted comes to another pod, which is not: it is not admitted, from its very first attempt on.
func TestAddressReuse(t *testing.T) {
	w := extra(t)
	p, bare := newPlace(t, w, "reuse"), newPlace(t, w, "reuse-bare", "mantlet.dev/inject=disabled")
	p.apply(server("api", 1), `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: api}
spec:
  podSelector: {matchLabels: {app: api}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}, {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: reuse-bare}}, podSelector: {matchLabels: {app: friend}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: user}
spec:
  podSelector: {matchLabels: {app: user}}
  egress: [{to: [{podSelector: {matchLabels: {app: db}}}]}]
`)
	p.ready("deployment/api")
	api := p.direct("api")
	for _, c := range []struct {
		place
		why  string
		want []traffic.Outcome
	}{
		{p, "pods with sidecars", []traffic.Outcome{traffic.Refused}},
		// The server's sidecar refuses; what connect() says then depends on how far the connection came.
		{bare, "pods without", []traffic.Outcome{traffic.Refused, traffic.Cut}},
	} {
		friend := c.flood("friend", "nodeName: node1, ", api)
		c.eventually(c.why, "friend", traffic.Reached, api)
		c.handOver("friend", flooding("foe", "nodeName: node1, ", api), "foe")
		foe := &flood{place: c.place, pod: "foe", addresses: friend.addresses}
		foe.log = foe.logOf("foe")
		now := foe.more(50)[api]
		allowed := 0
		for _, o := range c.want {
			allowed += now.Outcomes[o]
		}
		if allowed != now.Tried {
			t.Errorf("%s: who has the address of one that was admitted: %+v, want %v only", c.why, now, c.want)
		}
		t.Logf("%s: %d attempts with the address of one that was admitted: %v", c.why, now.Tried, now.Outcomes)
	}

	// The other way round: whom a pod may reach goes, and somebody else gets the address.
	serving := func(name string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %[1]s, labels: {app: %[1]s}}\nspec: {nodeName: node1, terminationGracePeriodSeconds: 1, containers: [{name: app, SERVE}]}", name)
	}
	p.apply(serving("db"), client("user", "nodeName: node2, "))
	p.ready("pod/db", "pod/user")
	db := p.direct("db")
	p.eventually("the database", "user", traffic.Reached, db)
	p.handOver("db", serving("imposter"), "imposter")
	p.want("who has the database's address", "user", traffic.Refused, db)
}

// handOver deletes a pod and makes another on the same node that gets its address.
func (p place) handOver(old, manifest, name string) {
	p.Helper()
	was := p.pod(old)
	p.kubectl("delete", "pod", old, "--timeout=60s")
	node, err := p.Cluster.Machine(was.Spec.NodeName)
	if err != nil {
		p.Fatal(err)
	}
	// Where CNI's host-local allocator begins to look; it would come round to the address after all others of the node.
	for i, ip := range was.Status.PodIPs {
		file := filepath.Join(node.Root(), "var/lib/cni/networks/pods", fmt.Sprintf("last_reserved_ip.%d", i))
		if _, err := os.Stat(file); err != nil {
			p.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(netip.MustParseAddr(ip.IP).Prev().String()), 0o644); err != nil {
			p.Fatal(err)
		}
	}
	p.apply(manifest)
	p.ready("pod/" + name)
	if is := p.pod(name).Status.PodIP; is != was.Status.PodIP {
		p.Fatalf("pod %s has the address %s, want that which %s had, %s", name, is, old, was.Status.PodIP)
	}
}

// A pod of the node's network has no sidecar, and is no pod to policies: its own node's pods admit it, as they do the kubelet; to others it is the
// node's address, which an ipBlock may name.
func TestHostNetwork(t *testing.T) {
	w := extra(t)
	t.Parallel()
	p := newPlace(t, w, "hostnet")
	onNode1 := strings.Replace(server("api", 1), "spec: {termination", "spec: {nodeName: node1, termination", 1)
	p.apply(onNode1, admit("api", "nobody"), client("near", "hostNetwork: true, nodeName: node1, "), client("far", "hostNetwork: true, nodeName: node2, "))
	p.ready("deployment/api", "pod/near", "pod/far")
	if n := len(p.pod("near").Spec.InitContainers); n != 0 {
		t.Errorf("a pod of the node's network has %d init containers", n)
	}
	p.want("from the own node", "near", traffic.Reached, p.direct("api"))
	p.want("from another node", "far", traffic.Refused, p.direct("api"))
	p.apply(fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: from-node2}
spec: {podSelector: {matchLabels: {app: api}}, ingress: [{from: [{ipBlock: {cidr: %s/32}}]}]}
`, p.pod("far").Status.PodIP))
	p.inForce("from-node2")
	p.want("an ipBlock names the other node", "far", traffic.Reached, p.direct("api"))

	// And as a destination.
	p.apply(`
apiVersion: v1
kind: Pod
metadata: {name: host, labels: {app: host}}
spec: {hostNetwork: true, nodeName: node2, terminationGracePeriodSeconds: 1, containers: [{name: app, image: "SERVER", args: [netexec, --http-port=18080, --udp-port=18081]}]}
`, client("bound", "nodeName: node1, "), fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: bound}
spec: {podSelector: {matchLabels: {app: bound}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: %s/32}}], ports: [{port: 18080}]}]}
`, p.pod("far").Status.PodIP))
	p.ready("pod/host", "pod/bound")
	p.eventually("an ipBlock names the node", "bound", traffic.Reached, p.pod("host").Status.PodIP+":18080")
	p.want("another port", "bound", traffic.Refused, p.pod("host").Status.PodIP+":10250")
}
