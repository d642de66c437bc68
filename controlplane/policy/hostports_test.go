package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/verdict"
)

// server is a pod shop/NAME with the address 10.64.0.N (0: none yet) on a node, and a container that has these ports.
func server(t *testing.T, name string, n int, node, ports string) *corev1.Pod {
	t.Helper()
	p := testPod("shop", name, n, map[string]string{"app": "server", "name": name})
	p.Spec.NodeName = node
	if n == 0 {
		p.Status.PodIPs = nil
	}
	read(t, ports, &p.Spec.Containers[0].Ports)
	return p
}

// hostWorld has clients on n1, n2 and n3, and a server with host ports on n1.
func hostWorld(t *testing.T, ports string) *Index {
	t.Helper()
	x := serviceWorld(t, "", "{addresses: [10.64.0.10]}")
	apply(t, x, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Address: "192.0.2.1"}}}},
		server(t, "a", 20, "n1", ports))
	return x
}

// TestHostPorts: to pods on its node a host port is the pod, to others it is the node's.
func TestHostPorts(t *testing.T) {
	x := hostWorld(t, "[{containerPort: 8080, hostPort: 80}, {containerPort: 8081, hostPort: 81, hostIP: 192.0.2.1}, {containerPort: 8082, hostPort: 82, hostIP: 0.0.0.0}, "+
		"{containerPort: 8083, hostPort: 83, hostIP: '198.51.100.1'}, {containerPort: 53, hostPort: 53, protocol: UDP}, {containerPort: 8084}]")
	const client = "shop/on-n1"
	for _, c := range []struct {
		client, at, endpoints string
		outside               bool
	}{
		{client, "10.64.0.1:80", "20", false},
		{client, "192.0.2.1:80", "20", false}, // an address that only the Node names
		{client, "10.64.0.1:81", "1", false},  // the node itself
		{client, "192.0.2.1:81", "20", false},
		{client, "192.0.2.1:82", "20", false},
		{client, "10.64.0.1:83", "1", false},
		{client, "198.51.100.1:83", "1", true}, // no address of the node
		{client, "10.64.0.1:53", "1", false},   // TCP
		{client, "10.64.0.1:8084", "1", false},
		{"shop/on-n2", "10.64.0.1:80", "1", false}, // says that its node has the address, too
		{"shop/on-n2", "192.0.2.1:80", "1", true},
		{"shop/on-", "10.64.0.1:80", "1", false}, // has no node
		{"shop/a", "10.64.0.1:80", "20", false},  // itself
	} {
		wantAt(t, x, c.client, c.at, c.endpoints, c.outside)
	}
	d, _ := x.DestinationFor(client, verdict.TCP, netip.MustParseAddrPort("10.64.0.1:80"))
	if e := d.Endpoints[0]; e.Addr != netip.MustParseAddrPort("10.64.0.20:8080") || e.Pod != "shop/a" || !e.Sidecar || e.ID.IsZero() {
		t.Errorf("behind it is %+v", e)
	}
	if got := fmt.Sprint(x.HostPorts(client)); got != "[10.64.0.1:80 10.64.0.1:82 192.0.2.1:80 192.0.2.1:81 192.0.2.1:82]" {
		t.Errorf("host ports %s", got)
	}
	if got := slices.Concat(x.HostPorts("shop/on-n2"), x.HostPorts("shop/on-"), x.HostPorts("shop/none")); got != nil {
		t.Errorf("others have %v", got)
	}
	if got := x.DestinationForAny(verdict.TCP, netip.MustParseAddrPort("192.0.2.1:80")); last(got.Others) != "20" || len(got.Endpoints) > 0 {
		t.Errorf("for anybody: %+v", got)
	}
}

// TestHostPortsOfWhom: pods that have no part in the node's port mapping have none.
func TestHostPortsOfWhom(t *testing.T) {
	const ports = "[{containerPort: 8080, hostPort: 80}]"
	x := hostWorld(t, "[]")
	want := func(what, endpoints string, p *corev1.Pod) {
		t.Helper()
		apply(t, x, p)
		wantAt(t, x, "shop/on-n1", "10.64.0.1:80", endpoints, false)
		if asked := len(x.HostPorts("shop/on-n1")) > 0; asked != (endpoints != "1") {
			t.Errorf("%s: asked about: %v", what, asked)
		}
	}
	want("nobody", "1", server(t, "a", 20, "n1", "[]"))
	want("scheduled", "", server(t, "a", 0, "n1", ports)) // the node leads it there before anybody says that the pod has an address
	want("running", "20", server(t, "a", 20, "n1", ports))
	want("elsewhere", "1", server(t, "a", 20, "n2", ports))
	want("not scheduled", "1", server(t, "a", 0, "", ports))
	p := server(t, "a", 20, "n1", ports)
	p.Spec.HostNetwork = true
	want("on the host's network", "1", p)
	p = server(t, "a", 20, "n1", ports)
	p.Status.Phase = corev1.PodFailed
	want("over", "1", p)
	p = server(t, "a", 20, "n1", "[]")
	p.Spec.InitContainers = []corev1.Container{{Name: "i", Ports: []corev1.ContainerPort{{ContainerPort: 8080, HostPort: 80}}}}
	want("an init container that ends", "1", p)
	p = p.DeepCopy()
	always := corev1.ContainerRestartPolicyAlways
	p.Spec.InitContainers[0].RestartPolicy = &always
	want("one that does not", "20", p)
	p = server(t, "a", 20, "n1", ports)
	p.Status.PodIPs = p.Status.PodIPs[1:]
	want("no address of the family", "1", p)
	if _, err := x.Delete(p); err != nil {
		t.Fatal(err)
	}
	if n := len(x.hosts.claims); n > 0 {
		t.Errorf("claims on %d nodes are left", n)
	}
	for _, name := range x.PodNames() {
		if _, err := x.Delete(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name[len("shop/"):]}}); err != nil {
			t.Fatal(err)
		}
	}
	if len(x.hosts.pods)+len(x.hosts.at) > 0 {
		t.Errorf("without pods there are %v, %v", x.hosts.pods, x.hosts.at)
	}
}

// TestHostPortsAreJudgedBehindThem: both ends' policy speaks of the pod, and none of the node; nothing else leads there.
func TestHostPortsAreJudgedBehindThem(t *testing.T) {
	x := hostWorld(t, "[{containerPort: 8080, hostPort: 80}, {containerPort: 5353, hostPort: 53, protocol: UDP}]")
	const client = "shop/on-n1"
	packets := func(endpoints string) {
		t.Helper()
		for _, a := range []string{"10.64.0.1:53", "192.0.2.1:53"} {
			s := x.Packets(client).Service(verdict.UDP, netip.MustParseAddrPort(a))
			if s == nil || fmt.Sprint(s.Endpoints) != endpoints {
				t.Errorf("datagrams to %s: %+v, want %s", a, s, endpoints)
			}
		}
		if s := x.Packets("shop/on-n2").Services; len(s) > 0 {
			t.Errorf("on another node: %+v", s)
		}
	}
	wantAt(t, x, client, "10.64.0.1:80", "20", false)
	packets("[10.64.0.20:5353]")
	d := apply(t, x, testPolicy(t, "metadata: {name: in, namespace: shop}\nspec: {podSelector: {matchLabels: {app: server}}}"))
	if !slices.Contains(d.Packets, client) || slices.Contains(d.Packets, "shop/on-n2") {
		t.Errorf("packets of %v", d.Packets)
	}
	wantAt(t, x, client, "10.64.0.1:80", "", false)
	wantAt(t, x, client, "10.64.0.1:81", "1", false)
	packets("[]")
	wantAt(t, x, "shop/a", "10.64.0.1:80", "20", false) // itself
	apply(t, x, testPolicy(t, `
metadata: {name: in, namespace: shop}
spec: {podSelector: {matchLabels: {app: server}}, ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 8080}, {port: 5353, protocol: UDP}]}]}`))
	wantAt(t, x, client, "10.64.0.1:80", "20", false)
	packets("[10.64.0.20:5353]")
	apply(t, x, testPolicy(t, `
metadata: {name: out, namespace: shop}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 192.0.2.0/24}}, {ipBlock: {cidr: 10.64.0.1/32}}]}]}`))
	wantAt(t, x, client, "192.0.2.1:80", "", false)
	wantAt(t, x, client, "192.0.2.1:81", "1", true) // as before: the address is not one from which the node speaks to the pod
	packets("[]")

	if a := x.Answer(client, verdict.TCP, netip.MustParseAddrPort("10.64.0.1:80")); a.Allowed {
		t.Errorf("a service that has the node for an endpoint leads to its host port: %+v", a)
	}
	if a := x.Answer("shop/on-n2", verdict.TCP, netip.MustParseAddrPort("10.64.0.1:80")); !a.Allowed || !a.Always {
		t.Errorf("to a pod on another node it is its own node: %+v", a)
	}
}

// TestServicesComeBeforeHostPorts, as kube-proxy's rules come before portmap's.
func TestServicesComeBeforeHostPorts(t *testing.T) {
	x := hostWorld(t, "[{containerPort: 8080, hostPort: 80}, {containerPort: 8080, hostPort: 30080}, {containerPort: 53, hostPort: 30053, protocol: UDP}]")
	wantAt(t, x, "shop/on-n1", "10.64.0.1:80", "20", false)
	wantAt(t, x, "shop/on-n1", "10.64.0.1:30080", "20", false)
	apply(t, x, serviceOf(t, "api", 0, "{type: NodePort, clusterIPs: [10.96.0.5], externalIPs: [10.64.0.1], ports: [{name: a, port: 80, nodePort: 30080}, {name: b, port: 53, protocol: UDP, nodePort: 30053}]}", "{}"))
	for _, at := range []string{"10.64.0.1:80", "10.64.0.1:30080"} {
		if d, ok := x.DestinationFor("shop/on-n1", verdict.TCP, netip.MustParseAddrPort(at)); !ok || d.Service != "shop/api" {
			t.Errorf("%s is %+v", at, d)
		}
	}
	if err := x.Packets("shop/on-n1").Validate(); err != nil { // nothing twice
		t.Error(err)
	}
}

// TestRivalsForAHostPort: of several pods that claim one, one has it, whichever is known first, and all of them are named.
func TestRivalsForAHostPort(t *testing.T) {
	pods := []*corev1.Pod{
		server(t, "a", 20, "n1", "[{containerPort: 8080, hostPort: 80}]"),
		server(t, "b", 21, "n1", "[{containerPort: 8080, hostPort: 80, hostIP: 10.64.0.1}]"),
		server(t, "c", 0, "n1", "[{containerPort: 8080, hostPort: 80}]"),
		server(t, "d", 23, "n2", "[{containerPort: 8080, hostPort: 80}]"),
	}
	for i, p := range pods {
		p.CreationTimestamp = metav1.NewTime(time.Unix(1_000_000-int64(i), 0)) // c is older than b, which is older than a
	}
	at := HostPort{"n1", verdict.TCP, 80}
	for range 2 {
		slices.Reverse(pods)
		x := hostWorld(t, "[]")
		apply(t, x, pods[0], pods[1], pods[2], pods[3])
		wantAt(t, x, "shop/on-n1", "10.64.0.1:80", "21", false)
		wantAt(t, x, "shop/on-n1", "192.0.2.1:80", "20", false)
		if got := fmt.Sprint(x.Rivals(at)); got != "[shop/b shop/a shop/c]" {
			t.Errorf("rivals %s", got)
		}
		d := apply(t, x, testPolicy(t, "metadata: {name: in, namespace: shop}\nspec: {podSelector: {matchLabels: {name: b}}}"))
		if wantAt(t, x, "shop/on-n1", "10.64.0.1:80", "", false); len(d.Subjects) != 1 { // not to the next one
			t.Errorf("subjects %v", d.Subjects)
		}
		d, err := x.Delete(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "b"}})
		if err != nil || fmt.Sprint(d.HostPorts) != fmt.Sprint([]HostPort{at}) {
			t.Errorf("%v, %v", err, d.HostPorts)
		}
		wantAt(t, x, "shop/on-n1", "10.64.0.1:80", "20", false)
	}
	x := hostWorld(t, "[{containerPort: 8080, hostPort: 80}]")
	if got := x.Rivals(at); got != nil {
		t.Errorf("alone it has rivals %v", got)
	}
}

// TestHostPortsFollowTheNode: a node that comes to have an address has its host ports there, too.
func TestHostPortsFollowTheNode(t *testing.T) {
	x := hostWorld(t, "[{containerPort: 8080, hostPort: 80}]")
	d := apply(t, x, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Address: "192.0.2.9"}}}})
	if fmt.Sprint(d.HostPorts) != fmt.Sprint([]HostPort{{"n1", verdict.TCP, 80}}) {
		t.Errorf("host ports %v", d.HostPorts)
	}
	wantAt(t, x, "shop/on-n1", "192.0.2.9:80", "20", false)
	wantAt(t, x, "shop/on-n1", "192.0.2.1:80", "1", true)
	if got := fmt.Sprint(x.NodesAt(netip.MustParseAddr("192.0.2.9"))); got != "[n1]" {
		t.Errorf("nodes %s", got)
	}
}
