package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/verdict"
)

const vip = "10.96.0.5:80"

// serviceWorld has clients on three nodes in two zones, and one on no node, and endpoints at 10.64.0.10 and up.
func serviceWorld(t *testing.T, spec, endpoints string) *Index {
	t.Helper()
	x := NewIndex(testConfig)
	for name, zone := range map[string]string{"n1": "east", "n2": "east", "n3": "west"} {
		apply(t, x, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelTopologyZone: zone}}})
	}
	for i, node := range []string{"", "n1", "n2", "n3"} {
		p := testPod("shop", "on-"+node, 2+i, map[string]string{"app": "client"})
		p.Spec.NodeName = node
		apply(t, x, p)
	}
	for i := range 5 {
		apply(t, x, testPod("shop", fmt.Sprint("api-", i), 10+i, map[string]string{"app": "api", "replica": fmt.Sprint(i)}))
	}
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "api"}}
	read(t, "{clusterIPs: [10.96.0.5], ports: [{port: 80, protocol: TCP}]"+spec+"}", &svc.Spec)
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "shop", Name: "api-1", Labels: map[string]string{discoveryv1.LabelServiceName: "api"}},
		AddressType: discoveryv1.AddressTypeIPv4,
	}
	read(t, "[{name: '', port: 8080, protocol: TCP}]", &slice.Ports)
	read(t, "["+endpoints+"]", &slice.Endpoints)
	apply(t, x, svc, slice)
	return x
}

func read(t *testing.T, text string, into any) {
	t.Helper()
	if err := yaml.UnmarshalStrict([]byte(text), into); err != nil {
		t.Fatal(err)
	}
}

// last writes the last numbers of the endpoints' addresses: "10 11".
func last(endpoints []Endpoint) string {
	var out []string
	for _, e := range endpoints {
		out = append(out, fmt.Sprint(e.Addr.Addr().As4()[3]))
	}
	return strings.Join(out, " ")
}

func TestEndpointsAreThoseOfTheServiceProxy(t *testing.T) {
	const (
		local    = ", internalTrafficPolicy: Local"
		gone     = "conditions: {ready: false, serving: false, terminating: true}"
		leaving  = "conditions: {ready: false, serving: true, terminating: true}"
		notReady = "conditions: {ready: false, serving: false}"
		zones    = "{addresses: [10.64.0.10], hints: {forZones: [{name: east}]}}, {addresses: [10.64.0.11], hints: {forZones: [{name: west}]}}"
		nodes    = "{addresses: [10.64.0.10], hints: {forNodes: [{name: n1}], forZones: [{name: east}]}}, {addresses: [10.64.0.11], hints: {forNodes: [{name: n3}], forZones: [{name: west}]}}"
	)
	for name, c := range map[string]struct {
		spec, endpoints string
		// from clients on no node, n1, n2, n3, and from nobody in particular
		want [5]string
	}{
		"absent conditions are ready and serving": {"", "{addresses: [10.64.0.11]}, {addresses: [10.64.0.10]}", [5]string{"10 11", "10 11", "10 11", "10 11", "10 11"}},
		"not ready": {"", "{addresses: [10.64.0.10], " + notReady + "}, {addresses: [10.64.0.11]}", [5]string{"11", "11", "11", "11", "11"}},
		// The slice says ready for publishNotReadyAddresses; the Service's own field is for whoever makes it.
		"published although not ready":              {"", "{addresses: [10.64.0.10], conditions: {ready: true, serving: false}}", [5]string{"10", "10", "10", "10", "10"}},
		"leaving beside ready":                      {"", "{addresses: [10.64.0.10], " + leaving + "}, {addresses: [10.64.0.11]}", [5]string{"11", "11", "11", "11", "11"}},
		"only leaving, and one that serves no more": {"", "{addresses: [10.64.0.10], " + leaving + "}, {addresses: [10.64.0.11], " + gone + "}, {addresses: [10.64.0.12], " + notReady + "}", [5]string{"10", "10", "10", "10", "10"}},
		"local": {local, "{addresses: [10.64.0.10], nodeName: n1}, {addresses: [10.64.0.11], nodeName: n3}, {addresses: [10.64.0.12]}, {addresses: [10.64.0.13], nodeName: ''}",
			[5]string{"", "10", "", "11", "10 11 12 13"}},
		"local, leaving there and ready elsewhere": {local, "{addresses: [10.64.0.10], nodeName: n1, " + leaving + "}, {addresses: [10.64.0.11], nodeName: n3}",
			[5]string{"", "10", "", "11", "11"}},
		"local goes before hints": {local, "{addresses: [10.64.0.10], nodeName: n1, hints: {forZones: [{name: west}]}}, {addresses: [10.64.0.11], nodeName: n3, hints: {forZones: [{name: east}]}}",
			[5]string{"", "10", "", "11", "10 11"}},
		"zones":                        {"", zones, [5]string{"10 11", "10", "10", "11", "10 11"}},
		"one without a zone":           {"", zones + ", {addresses: [10.64.0.12]}", [5]string{"10 11 12", "10 11 12", "10 11 12", "10 11 12", "10 11 12"}},
		"nobody for the client's zone": {"", "{addresses: [10.64.0.10], hints: {forZones: [{name: north}]}}", [5]string{"10", "10", "10", "10", "10"}},
		"hints of one that is not ready": {"", "{addresses: [10.64.0.10], hints: {forZones: [{name: east}]}, " + notReady + "}, {addresses: [10.64.0.11], hints: {forZones: [{name: west}]}}",
			[5]string{"11", "11", "11", "11", "11"}},
		"hints of those that leave do not count": {"", "{addresses: [10.64.0.10], hints: {forZones: [{name: east}]}, " + leaving + "}, {addresses: [10.64.0.11], hints: {forZones: [{name: west}]}, " + leaving + "}",
			[5]string{"10 11", "10 11", "10 11", "10 11", "10 11"}},
		"nodes, and where there is none the zone": {"", nodes, [5]string{"10 11", "10", "10", "11", "10 11"}},
		"only the first address has a meaning":    {"", "{addresses: [10.64.0.10, 10.64.0.11]}", [5]string{"10", "10", "10", "10", "10"}},
		"twice, once not ready":                   {"", "{addresses: [10.64.0.10], " + notReady + "}, {addresses: [10.64.0.10]}", [5]string{"10", "10", "10", "10", "10"}},
		"addresses of nobody's network": {"", "{addresses: [127.0.0.1]}, {addresses: [169.254.169.254]}, {addresses: [0.0.0.0]}, {addresses: [224.0.0.1]}, {addresses: ['::ffff:7f00:1']}, {addresses: [255.255.255.255]}, {addresses: [10.64.0.10]}",
			[5]string{"10", "10", "10", "10", "10"}},
		"none": {"", "", [5]string{}},
	} {
		t.Run(name, func(t *testing.T) {
			x := serviceWorld(t, c.spec, c.endpoints)
			to := netip.MustParseAddrPort(vip)
			all, ok := x.Destination(verdict.TCP, to)
			if !ok || last(all.Endpoints) != c.want[4] {
				t.Errorf("from nowhere: %q (%v), want %q", last(all.Endpoints), ok, c.want[4])
			}
			for i, client := range []string{"shop/on-", "shop/on-n1", "shop/on-n2", "shop/on-n3"} {
				d, ok := x.DestinationFor(client, verdict.TCP, to)
				if !ok || last(d.Endpoints) != c.want[i] {
					t.Errorf("from %s: %q (%v), want %q", client, last(d.Endpoints), ok, c.want[i])
				}
				if len(d.Endpoints)+len(d.Others) != len(all.Endpoints)+len(all.Others) {
					t.Errorf("from %s: %q and %q leave some out", client, last(d.Endpoints), last(d.Others))
				}
			}
		})
	}
}

func TestNodesAndZonesThatChangeAreNamed(t *testing.T) {
	x := serviceWorld(t, "", "{addresses: [10.64.0.10], hints: {forZones: [{name: east}]}}, {addresses: [10.64.0.11], hints: {forZones: [{name: west}]}}")
	want := func(what string, d Delta, pods, endpoints string) {
		t.Helper()
		got, _ := x.DestinationFor("shop/on-n1", verdict.TCP, netip.MustParseAddrPort(vip))
		if strings.Join(d.Pods, " ") != pods || last(got.Endpoints) != endpoints {
			t.Errorf("%s: pods %q, endpoints %q; want %q, %q", what, d.Pods, last(got.Endpoints), pods, endpoints)
		}
	}
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Labels: map[string]string{corev1.LabelTopologyZone: "west"}}}
	want("another zone", apply(t, x, node), "shop/on-n1", "11")
	want("nothing", apply(t, x, node), "", "11")
	d, err := x.Delete(node)
	if err != nil {
		t.Fatal(err)
	}
	want("no zone", d, "shop/on-n1", "10 11")
	p := testPod("shop", "on-n1", 3, map[string]string{"app": "client"})
	p.Spec.NodeName = "n3"
	want("another node", apply(t, x, p), "shop/on-n1", "11")
}

// TestStickyStays is about what sessionAffinity promises: one endpoint for each client, which moves only if it must.
func TestStickyStays(t *testing.T) {
	const clients = 50
	choose := func(x *Index) (out []string) {
		for i := range clients {
			name := fmt.Sprint("c-", i)
			apply(t, x, testPod("shop", name, 100+i, map[string]string{"app": "client"}))
			d, _ := x.DestinationFor("shop/"+name, verdict.TCP, netip.MustParseAddrPort(vip))
			got := x.Admitted("shop/"+name, d)
			if len(got) != 1 || !d.Sticky {
				t.Fatalf("%s: %v of %+v", name, got, d)
			}
			out = append(out, last(got))
		}
		return out
	}
	four := "{addresses: [10.64.0.10]}, {addresses: [10.64.0.11]}, {addresses: [10.64.0.12]}, {addresses: [10.64.0.13]}"
	sticky := ", sessionAffinity: ClientIP"
	before := choose(serviceWorld(t, sticky, four))
	share := map[string]int{}
	for _, e := range before {
		share[e]++
	}
	for _, e := range []string{"10", "11", "12", "13"} {
		if share[e] < clients/4/3 {
			t.Errorf("the clients are spread badly: %v", share)
		}
	}
	for i, now := range choose(serviceWorld(t, sticky, four)) {
		if now != before[i] {
			t.Errorf("client %d: %s, and another time %s", i, before[i], now)
		}
	}
	fewer := strings.Replace(four, "{addresses: [10.64.0.11]}, ", "", 1)
	for i, now := range choose(serviceWorld(t, sticky, fewer)) {
		if (now != before[i]) != (before[i] == "11") {
			t.Errorf("client %d went from %s to %s when 11 went", i, before[i], now)
		}
	}
	for i, now := range choose(serviceWorld(t, sticky, four+", {addresses: [10.64.0.14]}")) {
		if now != before[i] && now != "14" {
			t.Errorf("client %d went from %s to %s when 14 came", i, before[i], now)
		}
	}
	// A policy that takes an endpoint away moves those that were there, and nobody else.
	x := serviceWorld(t, sticky, four)
	apply(t, x, testPolicy(t, "metadata: {name: p, namespace: shop}\nspec: {podSelector: {matchLabels: {replica: '2'}}}"))
	for i, now := range choose(x) {
		if (now != before[i]) != (before[i] == "12") {
			t.Errorf("client %d went from %s to %s when 12 was closed", i, before[i], now)
		}
	}
}

// TestNodePorts: at any node a node port stands for the service, every other port for the node; and so does any port where no node is.
func TestNodePorts(t *testing.T) {
	x := serviceWorld(t, ", type: NodePort, internalTrafficPolicy: Local", "{addresses: [10.64.0.10], nodeName: n1}, {addresses: [10.64.0.11], nodeName: n3}")
	node := func(name string, addrs ...string) *corev1.Node {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
		for _, a := range append(addrs, name) { // NodeHostName is a name
			n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Address: a})
		}
		return n
	}
	apply(t, x, node("n1", "192.0.2.1", "2001:db8::1"), node("n3", "192.0.2.3", "203.0.113.3"))
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "api"}}
	with := func(ports string) {
		t.Helper()
		read(t, "{type: NodePort, internalTrafficPolicy: Local, clusterIPs: [10.96.0.5], ports: ["+ports+"]}", &svc.Spec)
		d := apply(t, x, svc)
		if !slices.Contains(d.NodePorts, uint16(svc.Spec.Ports[0].NodePort)) {
			t.Errorf("node ports %v are named for %s", d.NodePorts, ports)
		}
	}
	want := func(client, at, list string, known bool) {
		t.Helper()
		d, ok := x.DestinationFor(client, verdict.TCP, netip.MustParseAddrPort(at))
		if last(d.Endpoints) != list || ok != known {
			t.Errorf("%s to %s: %q (%v), want %q (%v)", client, at, last(d.Endpoints), ok, list, known)
		}
	}
	with("{port: 80, protocol: TCP, nodePort: 30080}")
	want("shop/on-n1", "10.64.0.1:30080", "10 11", true)
	want("shop/on-n1", "10.64.0.1:30081", "1", true)
	want("shop/on-n1", "10.64.0.1:80", "1", true)
	want("shop/on-n1", "10.64.0.7:30080", "", false) // nobody's, and no node's
	want("shop/nobody", "10.64.0.1:30080", "", false)
	want("shop/on-n1", "192.0.2.3:30080", "10 11", true)
	want("shop/on-n1", "203.0.113.3:30080", "10 11", true) // its external address
	want("shop/on-n1", "192.0.2.3:30081", "3", true)
	want("shop/on-n1", "192.0.2.9:30080", "9", true) // no node's
	if d, _ := x.DestinationFor("shop/on-n1", verdict.TCP, netip.MustParseAddrPort("192.0.2.3:30081")); !d.Outside || d.Service != "" {
		t.Errorf("another port of a node is %+v", d)
	}
	if got := fmt.Sprint(x.ServicePorts("shop/on-n1", verdict.TCP)); got != "[{10.64.0.1:30080 [10.64.0.10:8080 10.64.0.11:8080] true} {10.96.0.5:80 [10.64.0.10:8080] false} "+
		"{192.0.2.1:30080 [10.64.0.10:8080 10.64.0.11:8080] true} {192.0.2.3:30080 [10.64.0.10:8080 10.64.0.11:8080] true} {203.0.113.3:30080 [10.64.0.10:8080 10.64.0.11:8080] true} "+
		"{[2001:db8::1]:30080 [] true}]" {
		t.Errorf("service ports %s", got)
	}
	with("{port: 80, protocol: TCP, nodePort: 30081}")
	want("shop/on-n1", "10.64.0.1:30080", "1", true)
	want("shop/on-n1", "10.64.0.1:30081", "10 11", true)
	want("shop/on-n1", "192.0.2.3:30080", "3", true)

	svc.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	apply(t, x, svc)
	want("shop/on-n2", "192.0.2.3:30081", "11", true)
	want("shop/on-n2", "192.0.2.1:30081", "10", true)
	want("shop/on-n2", "10.64.0.1:30081", "", true) // its own node, which has none
	want("shop/on-n1", "10.64.0.1:30081", "10", true)
	if d := x.DestinationForAny(verdict.TCP, netip.MustParseAddrPort("192.0.2.1:30081")); len(d.Endpoints)+len(d.Others) != 2 {
		t.Errorf("for anybody: %+v", d)
	}

	if d := apply(t, x, node("n3", "192.0.2.4")); fmt.Sprint(d.Addrs) != "[192.0.2.3 192.0.2.4 203.0.113.3]" {
		t.Errorf("addresses of nodes that changed: %v", d.Addrs)
	}
	want("shop/on-n1", "192.0.2.3:30081", "3", true)
	want("shop/on-n1", "192.0.2.4:30081", "11", true)
	d, err := x.Delete(svc)
	if err != nil || fmt.Sprint(d.NodePorts) != "[30081]" {
		t.Errorf("%v of %v", err, d.NodePorts)
	}
	want("shop/on-n1", "10.64.0.1:30081", "1", true)
	want("shop/on-n1", "192.0.2.4:30081", "4", true)
}

// TestNodePortsAreJudgedBehindThem: a policy that admits a node's address admits what is on the node, and not what the node would balance to.
func TestNodePortsAreJudgedBehindThem(t *testing.T) {
	x := serviceWorld(t, ", type: NodePort", "{addresses: [10.64.0.10]}, {addresses: [10.64.0.11]}, {addresses: [192.0.2.3]}, {addresses: [10.64.0.1]}")
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n3"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.3"}}}}
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "api"}}
	read(t, "{type: NodePort, clusterIPs: [10.96.0.5], ports: [{port: 80, protocol: TCP, nodePort: 30080}]}", &svc.Spec)
	apply(t, x, n, svc)
	want := func(what, at, endpoints string) {
		t.Helper()
		d, _ := x.DestinationFor("shop/on-n1", verdict.TCP, netip.MustParseAddrPort(at))
		if got := last(x.Admitted("shop/on-n1", d)); got != endpoints {
			t.Errorf("%s: %s leads to %q, want %q", what, at, got, endpoints)
		}
	}
	want("open", "192.0.2.3:30080", "1 10 11 3")
	apply(t, x, testPolicy(t, "metadata: {name: in, namespace: shop}\nspec: {podSelector: {matchLabels: {replica: '1'}}}"))
	want("its endpoint 11 admits nobody", "192.0.2.3:30080", "1 10 3")
	apply(t, x, testPolicy(t, `
metadata: {name: out, namespace: shop}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 192.0.2.3/32}}]}]}`))
	want("egress to the node alone", "192.0.2.3:30080", "1 3") // a service of host network, on the node itself and the client's
	want("egress to the node alone", "192.0.2.3:30081", "3")
	want("egress to the node alone", "192.0.2.4:30081", "")

	// As an endpoint of somebody's slice a node port would be balanced by the node after all.
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "api-1", Labels: map[string]string{discoveryv1.LabelServiceName: "api"}},
		AddressType: discoveryv1.AddressTypeIPv4}
	read(t, "[{name: '', port: 30080, protocol: TCP}]", &slice.Ports)
	read(t, "[{addresses: [192.0.2.3]}, {addresses: [10.64.0.1]}]", &slice.Endpoints)
	apply(t, x, slice)
	want("a node port behind a service", vip, "")
	want("a node port behind a node port", "192.0.2.3:30080", "")
}

// TestServicesAreNoEndpoints: whoever connected there would be balanced by the node, to pods that no policy was asked about.
func TestServicesAreNoEndpoints(t *testing.T) {
	x := serviceWorld(t, "", "{addresses: [10.96.0.6]}, {addresses: [203.0.113.7]}")
	other := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "other"}}
	read(t, "{clusterIPs: [10.96.0.6], ports: [{port: 8080, protocol: TCP}]}", &other.Spec)
	apply(t, x, other)
	d, _ := x.DestinationFor("shop/on-n1", verdict.TCP, netip.MustParseAddrPort(vip))
	if got := x.Admitted("shop/on-n1", d); len(got) != 1 || got[0].Addr != netip.MustParseAddrPort("203.0.113.7:8080") {
		t.Errorf("%v of %+v", got, d)
	}
}

func TestServicePortsAreWhatTheClientMayUse(t *testing.T) {
	x := NewIndex(testConfig)
	apply(t, x, testPod("shop", "client", 2, map[string]string{"app": "client"}),
		testPod("shop", "dns-0", 10, map[string]string{"app": "dns", "replica": "0"}), testPod("shop", "dns-1", 11, map[string]string{"app": "dns", "replica": "1"}))
	svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "dns"}}
	read(t, "{clusterIPs: [10.96.0.10, 'fd00:10:96::a'], ports: [{name: dns, port: 53, protocol: UDP}, {name: tcp, port: 53, protocol: TCP}, {name: alt, port: 54, protocol: UDP}]}", &svc.Spec)
	apply(t, x, svc)
	for i, family := range []string{"IPv4", "IPv6"} {
		s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "dns-" + strings.ToLower(family), Labels: map[string]string{discoveryv1.LabelServiceName: "dns"}},
			AddressType: discoveryv1.AddressType(family)}
		read(t, "[{name: dns, port: 5353, protocol: UDP}]", &s.Ports)
		read(t, []string{"[{addresses: [10.64.0.11]}, {addresses: [10.64.0.10]}, {addresses: [192.0.2.9]}]", "[{addresses: ['fd00:10:64::10']}]"}[i], &s.Endpoints)
		apply(t, x, s)
	}
	want := func(what, list string) {
		t.Helper()
		if got := fmt.Sprint(x.ServicePorts("shop/client", verdict.UDP)); got != list {
			t.Errorf("%s: %s, want %s", what, got, list)
		}
	}
	want("open", "[{10.96.0.10:53 [10.64.0.10:5353 10.64.0.11:5353 192.0.2.9:5353] false} {10.96.0.10:54 [] false} {[fd00:10:96::a]:53 [[fd00:10:64::10]:5353] false} {[fd00:10:96::a]:54 [] false}]")
	apply(t, x, testPolicy(t, `
metadata: {name: out, namespace: shop}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {replica: "1"}}}], ports: [{port: 5353, protocol: UDP}]}]`))
	want("partly", "[{10.96.0.10:53 [10.64.0.11:5353] false} {10.96.0.10:54 [] false} {[fd00:10:96::a]:53 [] false} {[fd00:10:96::a]:54 [] false}]")
	if got := x.ServicePorts("shop/nobody", verdict.SCTP); len(got) != 0 {
		t.Errorf("SCTP: %v", got)
	}
}
