package incluster

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// The pods of a StatefulSet are reached by their names, and policy can tell one from the other.
func TestHeadless(t *testing.T) {
	w := extra(t)
	t.Parallel()
	p := newPlace(t, w, "headless")
	p.apply(`
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec: {terminationGracePeriodSeconds: 1, containers: [{name: app, SERVE}]}
`, admit("db", "web"), client("web", ""), client("other", ""))
	p.ready("statefulset/db", "pod/web", "pod/other")
	name := func(pod string) string { return pod + ".db.headless.svc.cluster.local:8080" }
	p.eventually("by name", "web", traffic.Reached, name("db-0"), name("db-1"), "db.headless.svc.cluster.local:8080")
	for i, a := range p.try("web", name("db-0"), name("db-1")) {
		if want := fmt.Sprintf("db-%d", i); a.Host != want {
			t.Errorf("%s: %s answered, want %s", a.To, a.Host, want)
		}
	}
	p.want("denied", "other", traffic.Refused, name("db-0"), name("db-1"))
	p.apply(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: first}
spec: {podSelector: {matchLabels: {statefulset.kubernetes.io/pod-name: db-0}}, ingress: [{from: [{podSelector: {matchLabels: {app: other}}}]}]}
`)
	p.inForce("first")
	p.eventually("a policy admits to the first one", "other", traffic.Reached, name("db-0"))
	p.want("and to that one alone", "other", traffic.Refused, name("db-1"))
}

// What kube-proxy would do for a Service its clients' sidecars do: affinity, and traffic that stays on the node.
func TestServiceRouting(t *testing.T) {
	w := extra(t)
	t.Parallel()
	p := newPlace(t, w, "routing")
	on := func(node string) string {
		return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: api-%[1]s, labels: {app: api}}
spec: {nodeName: %[1]s, terminationGracePeriodSeconds: 1, containers: [{name: app, SERVE}]}
`, node)
	}
	service := func(name, more string) string {
		return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s}\nspec: {%s, selector: {app: api}, ports: [{port: 80, targetPort: 8080}]}\n", name, more)
	}
	p.apply(on("node1"), on("node2"), service("any", "type: ClusterIP"), service("sticky", "sessionAffinity: ClientIP"), service("local", "internalTrafficPolicy: Local"),
		client("web1", "nodeName: node1, "), client("web2", "nodeName: node2, "), strings.Replace(admit("api", "x"), "{app: x}", "{}", 1))
	p.ready("pod/api-node1", "pod/api-node2", "pod/web1", "pod/web2")
	const attempts = 24
	hosts := func(from, name string) []string {
		t.Helper()
		p.eventually("admitted", from, traffic.Reached, p.service(name))
		var all []string
		for _, a := range p.try(from, slices.Repeat([]string{p.service(name)}, attempts)...) {
			if a.Outcome != traffic.Reached {
				t.Errorf("from %s to %s: %+v", from, name, a)
			}
			all = append(all, a.Host)
		}
		slices.Sort(all)
		return slices.Compact(all)
	}
	// One attempt may come before the second endpoint is known.
	if err := Await(t.Context(), patience, func(context.Context) error {
		if got := hosts("web1", "any"); len(got) != 2 {
			return fmt.Errorf("without affinity %d attempts reached %q, want both", attempts, got)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if got := hosts("web1", "sticky"); len(got) != 1 {
		t.Errorf("with affinity %d attempts reached %q, want one of them", attempts, got)
	}
	for node, from := range map[string]string{"node1": "web1", "node2": "web2"} {
		if got := hosts(from, "local"); !slices.Equal(got, []string{"api-" + node}) {
			t.Errorf("traffic that stays on the node, from %s: reached %q", node, got)
		}
	}
	p.kubectl("delete", "pod", "api-node1", "--timeout=60s")
	p.eventually("the node has no endpoint left", "web1", traffic.Refused, p.service("local"))
	p.want("other Services go on", "web1", traffic.Reached, p.service("any"))
	p.want("the other node goes on", "web2", traffic.Reached, p.service("local"))
}

// A pod reaches itself through its own Service, whatever policy says.
func TestHairpin(t *testing.T) {
	w := extra(t)
	t.Parallel()
	p := newPlace(t, w, "hairpin")
	p.apply(denyAll, `
apiVersion: v1
kind: Pod
metadata: {name: self, labels: {app: self}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "CLIENT", args: [pause]}, {name: server, SERVE}]
---
apiVersion: v1
kind: Service
metadata: {name: self}
spec: {selector: {app: self}, ports: [{port: 80, targetPort: 8080}]}
`, client("other", ""))
	p.ready("pod/self", "pod/other")
	p.want("itself", "self", traffic.Reached, "127.0.0.1:8080", p.direct("self"))
	p.eventually("itself through its Service", "self", traffic.Reached, p.service("self"))
	p.want("itself through its Service", "self", traffic.Reached, slices.Repeat([]string{p.service("self")}, 10)...)
	p.want("others", "other", traffic.Refused, p.direct("self"), p.service("self"))
}

// Both families of a dual-stack cluster are enforced: pods' addresses and cluster IPs.
func TestDualStack(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "dual")
	dual := strings.Replace(server("api", 1), "spec: {selector", "spec: {ipFamilyPolicy: RequireDualStack, selector", 1)
	p.apply(dual, admit("api", "web"), client("web", ""), client("other", ""))
	p.ready("deployment/api", "pod/web", "pod/other")
	var to []string
	for _, ip := range p.pods("api")[0].Status.PodIPs {
		to = append(to, net.JoinHostPort(ip.IP, "8080"))
	}
	for _, ip := range strings.Fields(p.kubectl("get", "service", "api", "-o", "jsonpath={.spec.clusterIPs[0]} {.spec.clusterIPs[1]}")) {
		to = append(to, net.JoinHostPort(ip, "80"))
	}
	if len(to) != 4 {
		t.Fatalf("addresses of api: %q, want two of the pod and two of the Service", to)
	}
	p.want("denied", "other", traffic.Refused, to...)
	p.eventually("admitted", "web", traffic.Reached, to...)
}
