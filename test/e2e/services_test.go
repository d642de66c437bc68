package e2e

import (
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/verdict"
)

// serving is a cluster of two nodes. web is on the first, where of the api's three replicas the first one is; caged may talk to nobody and is
// behind two services, of one of them alone; slow is not ready; plain has no sidecar.
const serving = `
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: legacy}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, containers: [{name: c, image: i}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api-0, namespace: shop, labels: {app: api, group: g, replica: "0"}, annotations: {mantlet.dev/server-first: "5432"}}
spec: {nodeName: n1, containers: [{name: c, image: i, ports: [{containerPort: 8080, hostPort: 9080}, {containerPort: 5432, hostPort: 9432}, {containerPort: 5353, protocol: UDP, hostPort: 9053}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api-1, namespace: shop, labels: {app: api, replica: "1"}, annotations: {mantlet.dev/server-first: "5432"}}
spec: {nodeName: n2, containers: [{name: c, image: i, ports: [{containerPort: 8080, hostPort: 9081}, {containerPort: 5432}, {containerPort: 5353, protocol: UDP}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api-2, namespace: shop, labels: {app: api, replica: "2"}, annotations: {mantlet.dev/server-first: "5432"}}
spec: {nodeName: n2, containers: [{name: c, image: i, ports: [{containerPort: 8080}, {containerPort: 5432}, {containerPort: 5353, protocol: UDP}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: caged, namespace: shop, labels: {app: caged, group: g}, annotations: {mantlet.dev/server-first: "5432"}}
spec: {nodeName: n2, containers: [{name: c, image: i, ports: [{containerPort: 8080, hostPort: 9082}, {containerPort: 5432}, {containerPort: 5353, protocol: UDP, hostPort: 9083}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: slow, namespace: shop, labels: {app: slow}}
spec: {nodeName: n1, containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
status: {conditions: [{type: Ready, status: "False"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: plain, namespace: legacy, labels: {app: plain}}
spec: {nodeName: n2, containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
status: {podIPs: [{ip: 10.64.0.200}, {ip: "fd00:10:64::200"}]}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec: {clusterIPs: [10.96.1.1, "fd00:10:96::101"], clusterIP: 10.96.1.1, selector: {app: api}, ports: [{name: web, port: 80, targetPort: 8080}, {name: db, port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: sticky, namespace: shop}
spec: {clusterIPs: [10.96.1.2, "fd00:10:96::102"], clusterIP: 10.96.1.2, selector: {app: api}, sessionAffinity: ClientIP, ports: [{name: web, port: 80, targetPort: 8080}, {name: db, port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: local, namespace: shop}
spec: {clusterIPs: [10.96.1.3, "fd00:10:96::103"], clusterIP: 10.96.1.3, selector: {app: api}, internalTrafficPolicy: Local, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: far, namespace: shop}
spec: {clusterIPs: [10.96.1.4, "fd00:10:96::104"], clusterIP: 10.96.1.4, selector: {app: caged}, internalTrafficPolicy: Local, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: near, namespace: shop}
spec: {clusterIPs: [10.96.1.5, "fd00:10:96::105"], clusterIP: 10.96.1.5, selector: {app: api}, trafficDistribution: PreferSameNode, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: early, namespace: shop}
spec: {clusterIPs: [10.96.1.6, "fd00:10:96::106"], clusterIP: 10.96.1.6, selector: {app: slow}, publishNotReadyAddresses: true, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: late, namespace: shop}
spec: {clusterIPs: [10.96.1.7, "fd00:10:96::107"], clusterIP: 10.96.1.7, selector: {app: slow}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: self, namespace: shop}
spec: {clusterIPs: [10.96.1.8, "fd00:10:96::108"], clusterIP: 10.96.1.8, selector: {app: caged}, ports: [{name: web, port: 80, targetPort: 8080}, {name: db, port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: group, namespace: shop}
spec: {clusterIPs: [10.96.1.9, "fd00:10:96::109"], clusterIP: 10.96.1.9, selector: {group: g}, ports: [{name: web, port: 80, targetPort: 8080}, {name: db, port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: node, namespace: shop}
spec: {type: NodePort, internalTrafficPolicy: Local, selector: {app: api}, ports: [{name: web, port: 80, targetPort: 8080, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {name: front, namespace: shop}
spec:
  {type: LoadBalancer, externalTrafficPolicy: Local, internalTrafficPolicy: Local, selector: {app: api}, externalIPs: [203.0.113.7, "2001:db8::7", 10.64.0.1, "fd00:10:64::1"],
   ports: [{name: web, port: 80, targetPort: 8080}, {name: db, port: 5432}, {name: dns, port: 53, protocol: UDP, targetPort: 5353}]}
status: {loadBalancer: {ingress: [{ip: 192.0.2.80}, {ip: "2001:db8::80", ipMode: VIP}]}}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, selector: {app: api}, ports: [{port: 8080}]}
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere, namespace: shop}
spec: {type: ExternalName, externalName: example.com}
---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: shop}
spec: {clusterIPs: [10.96.1.10, "fd00:10:96::10a"], clusterIP: 10.96.1.10, ports: [{port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: outside-4, namespace: shop, labels: {kubernetes.io/service-name: outside}}
addressType: IPv4
endpoints: [{addresses: [203.0.113.7]}, {addresses: [198.51.100.7]}, {addresses: [10.64.0.200]}]
ports: [{name: "", port: 8080, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: outside-6, namespace: shop, labels: {kubernetes.io/service-name: outside}}
addressType: IPv6
endpoints: [{addresses: ["2001:db8::7"]}, {addresses: ["fd00:10:64::200"]}]
ports: [{name: "", port: 8080, protocol: TCP}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: caged, namespace: shop}
spec: {podSelector: {matchLabels: {app: caged}}, policyTypes: [Ingress, Egress]}
`

var (
	vips     = map[string][2]string{}
	external = []string{"203.0.113.7/32:8080", "198.51.100.7/32:8080", "198.51.100.9/32:30090", "[2001:db8::7/128]:8080"}
)

func init() {
	for i, name := range []string{"api", "sticky", "local", "far", "near", "early", "late", "self", "group", "outside"} {
		vips[name] = [2]string{fmt.Sprintf("10.96.1.%d", i+1), fmt.Sprintf("fd00:10:96::1%02x", i+1)}
	}
	vips["front"] = [2]string{"203.0.113.7", "2001:db8::7"}
	vips["balancer"] = [2]string{"192.0.2.80", "2001:db8::80"}
	vips["node"] = [2]string{"10.64.0.1", "fd00:10:64::1"}
	vips["elsewhere"] = [2]string{"203.0.113.7", "2001:db8::7"}
}

// TestServices is about which endpoints a sidecar takes for a service. Each step that changes something puts it back.
func TestServices(t *testing.T) {
	m := manifests(t, serving)
	var o matrix.Options
	for _, text := range external {
		e, err := matrix.ParseExternal(text)
		if err != nil {
			t.Fatal(err)
		}
		o.External = append(o.External, e)
	}
	s := start(t, m, o)
	attempts, err := matrix.Plan(m, o)
	if err != nil {
		t.Fatal(err)
	}
	try(t, s, attempts)
	t.Run("endpoints", func(t *testing.T) { chosenEndpoints(t, s) })
	t.Run("sticky", func(t *testing.T) { stickyEndpoint(t, s, m) })
	t.Run("conditions", func(t *testing.T) { changingConditions(t, s, m) })
	t.Run("partly allowed", func(t *testing.T) { partlyAllowed(t, s) })
	t.Run("outside", func(t *testing.T) { outsideOfTheMesh(t, s, m) })
	t.Run("mixed", func(t *testing.T) { mixedEndpoints(t, s, m) })
	t.Run("another node", func(t *testing.T) { anotherNode(t, s, m) })
	t.Run("external addresses", func(t *testing.T) { externalAddresses(t, s, m) })
	t.Run("host ports", func(t *testing.T) { hostPorts(t, s) })
	t.Run("another service", func(t *testing.T) { changingService(t, s, m) })
}

// reached makes so many connections and lists who answered, sorted; "" where nobody did. Nobody may keep it waiting.
func reached(t *testing.T, s *sandbox.Sandbox, from, vip string, port uint16, n int) []string {
	t.Helper()
	target := netns.Target{Addr: at(vip, port), Speaks: netns.ClientFirst, Nonce: "hello"}
	if port == banner {
		target.Speaks, target.Nonce = netns.ServerFirst, ""
	}
	out, err := pod(t, s, from).Probe(t.Context(), slices.Repeat([]netns.Target{target}, n))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, o := range out {
		if o.Reached == "" {
			wantNothing(t, o)
		} else if o.Err != "" {
			t.Errorf("%s: %s, and then %s", o.Target.Addr, o.Reached, o.Err)
		}
		name := o.Reached[:max(0, strings.LastIndex(o.Reached, ":"))]
		name = strings.TrimPrefix(strings.TrimPrefix(name, "shop/"), "legacy/")
		seen[name] = true
	}
	return slices.Sorted(maps.Keys(seen))
}

// wantBehind wants exactly these pods to answer by a service, in both families; "" is nobody. The choice is random: of three, 60 tries
// leave one out once in 10^10.
func wantBehind(t *testing.T, s *sandbox.Sandbox, from, service string, port uint16, want ...string) {
	t.Helper()
	n := 60
	if len(want) == 1 && want[0] == "" {
		n = 2
	}
	for _, vip := range vips[service] {
		if got := reached(t, s, from, vip, port, n); !slices.Equal(got, want) {
			t.Errorf("%s by %s (%s): %q, want %q", from, service, vip, got, want)
		}
	}
}

func chosenEndpoints(t *testing.T, s *sandbox.Sandbox) {
	all := []string{"api-0", "api-1", "api-2"}
	for _, port := range []uint16{80, banner} {
		wantBehind(t, s, "shop/web", "api", port, all...)
		// A pod reaches itself whatever policies say, also by a service, and nobody else behind it.
		wantBehind(t, s, "shop/caged", "self", port, "caged")
		wantBehind(t, s, "shop/caged", "group", port, "caged")
		wantBehind(t, s, "shop/web", "group", port, "api-0")
		wantBehind(t, s, "shop/web", "self", port, "")
		wantBehind(t, s, "shop/api-0", "group", port, "api-0")
		wantBehind(t, s, "shop/api-0", "api", port, all...)
	}
	wantBehind(t, s, "shop/web", "local", 80, "api-0")
	wantBehind(t, s, "shop/api-1", "local", 80, "api-1", "api-2")
	wantBehind(t, s, "shop/web", "far", 80, "")
	wantBehind(t, s, "shop/caged", "far", 80, "caged")
	wantBehind(t, s, "shop/web", "near", 80, "api-0")
	wantBehind(t, s, "shop/api-2", "near", 80, "api-1", "api-2")
	wantBehind(t, s, "shop/web", "early", 80, "slow")
	wantBehind(t, s, "shop/web", "late", 80, "")
	wantBehind(t, s, "shop/web", "api", 81, "") // no such port

	// A node port of the own node is one more address of the service; the other ports there are the node's, which is always admitted.
	wantBehind(t, s, "shop/web", "node", 30080, all...)
	wantBehind(t, s, "shop/caged", "node", 30080, "")
	for _, a := range vips["node"] {
		for _, port := range []uint16{30081, 20080} {
			l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", at(a, port).String())
			if err != nil {
				t.Fatal(err)
			}
			served := serveLine(l, "the node\n")
			if got := say(t, pod(t, s, "shop/caged"), at(a, port), "who is there?\n"); got != "the node\n" {
				t.Errorf("port %d of the own node: %q", port, got)
			}
			_ = l.Close()
			<-served
		}
	}
}

// anotherNode: an address outside is what ipBlocks say, on any port, until a node has it: then its node ports are the service's, and only those.
func anotherNode(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) {
	all := []string{"api-0", "api-1", "api-2"}
	outside := func(from, who string) {
		t.Helper()
		for _, vip := range vips["elsewhere"] {
			if got := reached(t, s, from, vip, 8080, 2); (len(got) == 1 && got[0] != "") != (who != "") {
				t.Errorf("%s to %s: answered by %q, want %q", from, vip, got, who)
			}
		}
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "elsewhere"}}
	apply := func(objects ...metav1.Object) {
		t.Helper()
		if err := s.ControlPlane().Update(objects, nil); err != nil {
			t.Fatal(err)
		}
		confirmed(t, s, "shop/web", "shop/caged")
	}
	for _, vip := range vips["elsewhere"] { // nobody listens there
		if got := reached(t, s, "shop/web", vip, 30080, 2); !slices.Equal(got, []string{""}) {
			t.Errorf("web by %s before it is a node's: %q", vip, got)
		}
	}
	wantBehind(t, s, "shop/caged", "elsewhere", 30080, "")
	for _, vip := range vips["elsewhere"] {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: vip})
	}
	apply(node)
	wantBehind(t, s, "shop/web", "elsewhere", 30080, all...)
	wantBehind(t, s, "shop/caged", "elsewhere", 30080, "")
	outside("shop/web", "the node")
	outside("shop/caged", "")

	at := slices.IndexFunc(m.Objects.Services, func(s *corev1.Service) bool { return s.Name == "node" })
	local := m.Objects.Services[at].DeepCopy()
	local.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	apply(local)
	wantBehind(t, s, "shop/web", "elsewhere", 30080, "") // it has no endpoint
	wantBehind(t, s, "shop/web", "node", 30080, "api-0")
	apply(m.Objects.Services[at])
	wantBehind(t, s, "shop/web", "elsewhere", 30080, all...)
	node = node.DeepCopy()
	node.Status.Addresses = nil
	apply(node)
	for _, vip := range vips["elsewhere"] {
		if got := reached(t, s, "shop/web", vip, 30080, 2); !slices.Equal(got, []string{""}) {
			t.Errorf("web by %s when it is a node's no more: %q", vip, got)
		}
	}
}

// externalAddresses: at external addresses of a service all its endpoints are behind its ports, whatever the traffic policies, also where the address is a
// node's. At other ports the address is what it was, and so it is when the service lets go of it. Whoever names an address that another service has, or a
// cluster IP, gets nothing of it.
func externalAddresses(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) {
	all := []string{"api-0", "api-1", "api-2"}
	for _, name := range []string{"front", "balancer", "node"} {
		for _, port := range []uint16{80, banner} {
			wantBehind(t, s, "shop/web", name, port, all...)
			wantBehind(t, s, "shop/caged", name, port, "")
		}
	}
	outside := func(when string) {
		t.Helper()
		for _, vip := range vips["front"] {
			if got := reached(t, s, "shop/web", vip, 8080, 2); len(got) != 1 || got[0] == "" || slices.Contains(all, got[0]) {
				t.Errorf("%s: another port of %s: answered by %q", when, vip, got)
			}
		}
		wantBehind(t, s, "shop/caged", "front", 8080, "")
	}
	outside("while it is a service's")
	front := m.Objects.Services[slices.IndexFunc(m.Objects.Services, func(s *corev1.Service) bool { return s.Name == "front" })]
	moved := front.DeepCopy()
	moved.Spec.ExternalIPs = []string{vips["api"][0]} // which is another's cluster IP
	applied(t, s, moved)
	wantBehind(t, s, "shop/web", "balancer", 80, all...)
	wantBehind(t, s, "shop/caged", "front", 80, "")
	outside("when it is not any more")
	rival := m.Objects.Services[slices.IndexFunc(m.Objects.Services, func(s *corev1.Service) bool { return s.Name == "early" })].DeepCopy()
	rival.Spec.ExternalIPs = []string{vips["balancer"][0], vips["balancer"][1], vips["front"][0], vips["front"][1], vips["api"][0], vips["api"][1]}
	applied(t, s, rival)
	wantBehind(t, s, "shop/web", "balancer", 80, all...)
	wantBehind(t, s, "shop/web", "front", 80, "slow") // nobody had it
	wantBehind(t, s, "shop/web", "api", 80, all...)
	rival.Spec.ExternalIPs = nil
	applied(t, s, rival, front)
	wantBehind(t, s, "shop/web", "front", 80, all...)
}

// slicesOf are copies of the slices of a service, to change.
func slicesOf(m *source.Manifests, service string) []*discoveryv1.EndpointSlice {
	var out []*discoveryv1.EndpointSlice
	for _, s := range m.Objects.EndpointSlices {
		if s.Labels[discoveryv1.LabelServiceName] == service {
			out = append(out, s.DeepCopy())
		}
	}
	return out
}

// applied changes objects under the running sidecars and returns when they hold what follows from it.
func applied[T interface {
	*discoveryv1.EndpointSlice | *corev1.Service
}](t *testing.T, s *sandbox.Sandbox, objects ...T) {
	t.Helper()
	for _, o := range objects {
		var err error
		switch o := any(o).(type) {
		case *discoveryv1.EndpointSlice:
			err = s.ControlPlane().Apply(o)
		case *corev1.Service:
			err = s.ControlPlane().Apply(o)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	confirmed(t, s, "shop/web", "shop/api-0", "shop/api-1", "shop/api-2", "shop/caged", "shop/slow")
}

// each changes every endpoint of slices, with its pod's name.
func each(list []*discoveryv1.EndpointSlice, change func(pod string, c *discoveryv1.EndpointConditions)) []*discoveryv1.EndpointSlice {
	for _, s := range list {
		for i := range s.Endpoints {
			name := ""
			if ref := s.Endpoints[i].TargetRef; ref != nil {
				name = ref.Name
			}
			change(name, &s.Endpoints[i].Conditions)
		}
	}
	return list
}

// stickyEndpoint: each family has an endpoint of its own, on all ports; when that goes another one takes its place, and when it is back so
// is the client. When another one goes and comes nothing changes. A connection that is open stays where it is, whatever comes and goes.
func stickyEndpoint(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) {
	one := func(vip string) string {
		t.Helper()
		got := reached(t, s, "shop/web", vip, 80, 30)
		if len(got) != 1 || got[0] == "" {
			t.Fatalf("by %s: %q, want one", vip, got)
		}
		if others := reached(t, s, "shop/web", vip, banner, 30); !slices.Equal(got, others) {
			t.Errorf("by %s: %q on one port and %q on the other", vip, got, others)
		}
		return got[0]
	}
	without := func(gone string) {
		no, yes := false, true
		applied(t, s, each(slicesOf(m, "sticky"), func(pod string, c *discoveryv1.EndpointConditions) {
			c.Ready = &yes
			if pod == gone {
				c.Ready = &no
			}
		})...)
	}
	for _, vip := range vips["sticky"] {
		first := one(vip)
		st := open(t, s, at(vip, 80), first)
		for _, gone := range []string{"api-0", "api-1", "api-2"} {
			without(gone)
			if now := one(vip); now == gone || now != first && gone != first {
				t.Errorf("by %s: %s became %s when %s went", vip, first, now, gone)
			}
			if who := st.talk(t); !strings.Contains(who, first) {
				t.Errorf("by %s: a connection to %s is answered by %s", vip, first, who)
			}
		}
		without("")
		if now := one(vip); now != first {
			t.Errorf("by %s: %s became %s when all were back", vip, first, now)
		}
	}
}

// changingConditions: endpoints that become ready are used at once, and where none is ready those that leave and still serve.
func changingConditions(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) {
	yes, no := true, false
	wantBehind(t, s, "shop/web", "late", 80, "")
	applied(t, s, each(slicesOf(m, "late"), func(_ string, c *discoveryv1.EndpointConditions) { c.Ready, c.Serving = &yes, &yes })...)
	wantBehind(t, s, "shop/web", "late", 80, "slow")
	applied(t, s, slicesOf(m, "late")...)
	wantBehind(t, s, "shop/web", "late", 80, "")

	leave := func(serving string) {
		applied(t, s, each(slicesOf(m, "api"), func(pod string, c *discoveryv1.EndpointConditions) {
			c.Ready, c.Serving, c.Terminating = &no, &no, &yes
			if pod == serving {
				c.Serving = &yes
			}
		})...)
	}
	leave("api-1")
	wantBehind(t, s, "shop/web", "api", 80, "api-1")
	leave("")
	wantBehind(t, s, "shop/web", "api", 80, "")
	applied(t, s, slicesOf(m, "api")...)
	wantBehind(t, s, "shop/web", "api", 80, "api-0", "api-1", "api-2")
}

// hostPorts: to pods on its node a host port is the pod, judged by the policies of both. The node leads there who has no sidecar, with its own address,
// which every pod on it admits.
func hostPorts(t *testing.T, s *sandbox.Sandbox) {
	wantBehind(t, s, "shop/web", "node", 9080, "api-0")
	wantBehind(t, s, "shop/api-0", "node", 9080, "api-0") // itself
	wantBehind(t, s, "shop/api-2", "node", 9081, "api-1")
	wantBehind(t, s, "legacy/plain", "node", 9082, "caged") // the node does lead there, past policy
	wantBehind(t, s, "shop/api-1", "node", 9082, "")        // which admits nobody
	wantBehind(t, s, "shop/caged", "node", 9082, "caged")   // but itself
	wantBehind(t, s, "shop/caged", "node", 9081, "")        // and may go nowhere

	var attempts []matrix.Attempt // to be held against the evaluator, mTLS too
	for node, pods := range map[string][]string{"n1": {"web", "api-0"}, "n2": {"api-1", "api-2", "caged"}} {
		ports := map[string][]uint16{"n1": {9080, 9432, 9053}, "n2": {9081, 9082, 9083}}[node]
		for _, from := range pods {
			for _, port := range ports {
				proto := verdict.TCP
				if port == 9053 || port == 9083 {
					proto = verdict.UDP
				}
				for _, vip := range vips["node"] {
					attempts = append(attempts, matrix.Attempt{From: "shop/" + from, To: "host port", Via: matrix.ViaService, Addr: at(vip, port), Protocol: proto})
				}
			}
		}
	}
	allowed := 0
	for _, c := range try(t, s, attempts).Report.Connections {
		if c.Verdict == matrix.Allowed {
			allowed++
		}
	}
	if want := 2 * (2*3 + 2*1 + 2); allowed != want { // all at n1; at n2 api-1, not by caged, and caged by itself
		t.Errorf("%d attempts are allowed, want %d", allowed, want)
	}
}
