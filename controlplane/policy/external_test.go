package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/verdict"
)

// externalWorld is serviceWorld with another service, other, behind which is 10.64.0.13.
func externalWorld(t *testing.T, spec string) *Index {
	t.Helper()
	x := serviceWorld(t, spec, "{addresses: [10.64.0.10], nodeName: n1}, {addresses: [10.64.0.11], nodeName: n3}")
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "other-1", Labels: map[string]string{discoveryv1.LabelServiceName: "other"}},
		AddressType: discoveryv1.AddressTypeIPv4}
	read(t, "[{name: '', port: 8080, protocol: TCP}]", &slice.Ports)
	read(t, "[{addresses: [10.64.0.13]}]", &slice.Endpoints)
	apply(t, x, slice)
	return x
}

// service reads a Service shop/NAME; its age counts seconds.
func serviceOf(t *testing.T, name string, age int, spec, status string) *corev1.Service {
	t.Helper()
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, CreationTimestamp: metav1.NewTime(time.Unix(1_000_000-int64(age), 0))}}
	read(t, spec, &s.Spec)
	read(t, status, &s.Status)
	return s
}

func wantAt(t *testing.T, x *Index, client, at, endpoints string, outside bool) {
	t.Helper()
	d, _ := x.DestinationFor(client, verdict.TCP, netip.MustParseAddrPort(at))
	if got := last(x.Admitted(client, d)); got != endpoints || d.Outside != outside {
		t.Errorf("%s to %s: %q (outside %v), want %q (%v)", client, at, got, d.Outside, endpoints, outside)
	}
}

// TestExternalAddresses: at its ports an external address stands for the service, at all others for what it was.
func TestExternalAddresses(t *testing.T) {
	x := externalWorld(t, ", internalTrafficPolicy: Local, externalTrafficPolicy: Local, type: LoadBalancer")
	apply(t, x, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n3"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Address: "192.0.2.3"}}}})
	const spec = "type: LoadBalancer, clusterIPs: [10.96.0.5], ports: [{port: 80, protocol: TCP, nodePort: 30080}], internalTrafficPolicy: Local, externalTrafficPolicy: Local"
	d := apply(t, x, serviceOf(t, "api", 0, "{"+spec+", externalIPs: [203.0.113.1, 10.64.0.1, 192.0.2.3, '2001:db8::1', 127.0.0.1, 224.0.0.1, junk]}",
		"{loadBalancer: {ingress: [{ip: 203.0.113.2}, {ip: 203.0.113.3, ipMode: Proxy}, {ip: 203.0.113.4, ipMode: VIP}, {hostname: lb.example}]}}"))
	if !d.External || fmt.Sprint(d.Addrs) != "[10.64.0.1 10.96.0.5 192.0.2.3 203.0.113.1 203.0.113.2 203.0.113.4]" {
		t.Errorf("external %v, addresses %v", d.External, d.Addrs)
	}
	if got := fmt.Sprint(x.External()); got != "[10.64.0.1:80 192.0.2.3:80 203.0.113.1:80 203.0.113.2:80 203.0.113.4:80]" {
		t.Errorf("external addresses %s", got)
	}
	const client = "shop/on-n1"
	for _, a := range []string{"10.64.0.1", "192.0.2.3", "203.0.113.1", "203.0.113.2", "203.0.113.4"} {
		wantAt(t, x, client, a+":80", "10 11", false) // all endpoints, whatever the traffic policies
	}
	wantAt(t, x, client, "203.0.113.1:81", "1", true)
	wantAt(t, x, client, "203.0.113.3:80", "3", true) // the load balancer is a proxy
	wantAt(t, x, client, "10.64.0.1:81", "1", false)  // its own node
	wantAt(t, x, client, "192.0.2.3:81", "3", true)
	wantAt(t, x, client, "192.0.2.3:30080", "11", false) // a node port has externalTrafficPolicy Local
	if d := x.DestinationForAny(verdict.TCP, netip.MustParseAddrPort("203.0.113.1:80")); d.Service != "shop/api" || len(d.Endpoints) != 2 {
		t.Errorf("for anybody: %+v", d)
	}
	if a := x.Reach(client, verdict.TCP, netip.MustParseAddrPort("203.0.113.1:80")); a.Own || !a.Known || a != x.Reach("shop/on-n2", verdict.TCP, netip.MustParseAddrPort("203.0.113.1:80")) {
		t.Errorf("clients alike are not answered alike: %+v", a)
	}

	d = apply(t, x, serviceOf(t, "api", 0, "{"+spec+", externalIPs: [203.0.113.1]}", "{}"))
	if !d.External || !slices.Contains(d.Addrs, netip.MustParseAddr("203.0.113.2")) {
		t.Errorf("external %v, addresses %v", d.External, d.Addrs)
	}
	wantAt(t, x, client, "203.0.113.2:80", "2", true)
	wantAt(t, x, client, "10.64.0.1:80", "1", false)
	d = apply(t, x, serviceOf(t, "api", 0, "{"+spec+", externalIPs: [203.0.113.1], sessionAffinity: ClientIP}", "{}"))
	if d.External || !slices.Contains(d.Addrs, netip.MustParseAddr("203.0.113.1")) {
		t.Errorf("the same addresses: external %v, addresses %v", d.External, d.Addrs)
	}
	for name, s := range map[string]string{"headless": "clusterIPs: [None], clusterIP: None", "a name": "type: ExternalName, externalName: a.example"} {
		if apply(t, x, serviceOf(t, "api", 0, "{"+s+", ports: [{port: 80, protocol: TCP}], externalIPs: [203.0.113.1]}", "{}")); len(x.External()) != 0 {
			t.Errorf("%s has %v", name, x.External())
		}
	}
	apply(t, x, serviceOf(t, "api", 0, "{"+spec+", externalIPs: [203.0.113.1]}", "{}"))
	if d, err := x.Delete(serviceOf(t, "api", 0, "{}", "{}")); err != nil || !d.External || len(x.External()) != 0 || len(x.services.external.claims) != 0 {
		t.Errorf("after it is gone: %v, %v", err, x.External())
	}
}

// TestExternalAddressesAreJudgedBehindThem: a policy that admits the address admits no endpoint, and no other service leads there.
func TestExternalAddressesAreJudgedBehindThem(t *testing.T) {
	x := externalWorld(t, "")
	apply(t, x, serviceOf(t, "api", 0, "{clusterIPs: [10.96.0.5], ports: [{port: 80, protocol: TCP}], externalIPs: [203.0.113.1]}", "{}"))
	const client = "shop/on-n1"
	wantAt(t, x, client, "203.0.113.1:80", "10 11", false)
	apply(t, x, testPolicy(t, "metadata: {name: in, namespace: shop}\nspec: {podSelector: {matchLabels: {replica: '1'}}}"))
	wantAt(t, x, client, "203.0.113.1:80", "10", false) // 11 admits nobody
	apply(t, x, testPolicy(t, `
metadata: {name: out, namespace: shop}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: [{ipBlock: {cidr: 203.0.113.1/32}}]}]}`))
	wantAt(t, x, client, "203.0.113.1:80", "", false)
	wantAt(t, x, client, "203.0.113.1:81", "1", true)
	apply(t, x, testPolicy(t, `
metadata: {name: out, namespace: shop}
spec: {podSelector: {matchLabels: {app: client}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: api}}}]}]}`))
	wantAt(t, x, client, "203.0.113.1:80", "10", false)
	wantAt(t, x, client, "203.0.113.1:81", "", true)
	if _, err := x.Delete(testPolicy(t, "metadata: {name: out, namespace: shop}")); err != nil {
		t.Fatal(err)
	}

	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "other-1", Labels: map[string]string{discoveryv1.LabelServiceName: "other"}},
		AddressType: discoveryv1.AddressTypeIPv4}
	read(t, "[{name: '', port: 80, protocol: TCP}, {name: alt, port: 81, protocol: TCP}]", &slice.Ports)
	read(t, "[{addresses: [203.0.113.1]}]", &slice.Endpoints)
	apply(t, x, slice, serviceOf(t, "other", 0, "{clusterIPs: [10.96.0.6], ports: [{port: 80, protocol: TCP}, {name: alt, port: 81, protocol: TCP}]}", "{}"))
	wantAt(t, x, client, "10.96.0.6:80", "", false)
	wantAt(t, x, client, "10.96.0.6:81", "1", false)
}

// TestExternalAddressesOfSomebodyElse: who names an address of a pod, a cluster IP, or what another service has, gets nothing of it.
func TestExternalAddressesOfSomebodyElse(t *testing.T) {
	x := externalWorld(t, "")
	const client = "shop/on-n1"
	const ports = "ports: [{port: 80, protocol: TCP}]"
	other := func(age int, externalIPs string) *corev1.Service {
		return serviceOf(t, "other", age, "{clusterIPs: [10.96.0.6], "+ports+", externalIPs: ["+externalIPs+"]}", "{}")
	}
	api := func(spec, status string) *corev1.Service {
		return serviceOf(t, "api", 10, "{clusterIPs: [10.96.0.5], "+ports+spec+"}", status)
	}
	apply(t, x, api("", "{}"), other(100, "10.64.0.14, 10.96.0.5, 10.64.0.99"))
	wantAt(t, x, client, "10.64.0.14:80", "14", false)
	wantAt(t, x, client, "10.96.0.5:80", "10 11", false)
	wantAt(t, x, client, "10.64.0.99:80", "13", false)
	if d := apply(t, x, testPod("shop", "late", 99, map[string]string{"app": "late"})); !slices.Contains(d.Pods, "shop/late") {
		t.Errorf("%+v", d)
	}
	wantAt(t, x, client, "10.64.0.99:80", "99", false)
	if got := fmt.Sprint(x.Contests(netip.MustParseAddr("10.64.0.99")), x.Contests(netip.MustParseAddr("10.96.0.5"))); got !=
		"[{TCP 10.64.0.99:80 pod shop/late [shop/other]}] [{TCP 10.96.0.5:80 cluster IP of service shop/api [shop/other]}]" {
		t.Errorf("contests %s", got)
	}
	for _, c := range []struct {
		what         string
		one, another *corev1.Service
		want         string
	}{
		{"the first of two", api(", externalIPs: [203.0.113.1]", "{}"), other(9, "203.0.113.1"), "10 11"},
		{"the first of two, told of later", api(", externalIPs: [203.0.113.1]", "{}"), other(11, "203.0.113.1"), "13"},
		{"the first by name of two as old", api(", externalIPs: [203.0.113.1]", "{}"), other(10, "203.0.113.1"), "10 11"},
		{"what a load balancer was given goes first", api("", "{loadBalancer: {ingress: [{ip: 203.0.113.1}]}}"), other(100, "203.0.113.1"), "10 11"},
	} {
		t.Run(c.what, func(t *testing.T) {
			for range 2 {
				apply(t, x, c.one, c.another)
				wantAt(t, x, client, "203.0.113.1:80", c.want, false)
				if n := x.Contests(netip.MustParseAddr("203.0.113.1")); len(n) != 1 || len(n[0].Others) != 1 {
					t.Errorf("contests %v", n)
				}
				c.one, c.another = c.another, c.one
			}
		})
	}
	if d := apply(t, x, other(100, "")); d.External {
		t.Error("an address that another service still has is said to have gone")
	}
	wantAt(t, x, client, "203.0.113.1:80", "10 11", false)
}

// TestSourceRanges: at an address of the load balancer clients come from spec.loadBalancerSourceRanges only, of the family of the address.
func TestSourceRanges(t *testing.T) {
	x := externalWorld(t, "")
	const status = "{loadBalancer: {ingress: [{ip: 203.0.113.2}]}}"
	with := func(ranges string) {
		t.Helper()
		apply(t, x, serviceOf(t, "api", 0, "{clusterIPs: [10.96.0.5], ports: [{port: 80, protocol: TCP}], externalIPs: [203.0.113.1], loadBalancerSourceRanges: ["+ranges+"]}", status))
	}
	with("' 10.64.0.3/32 ', 'fd00::/8'") // the API server lets white space pass
	wantAt(t, x, "shop/on-n1", "203.0.113.2:80", "10 11", false)
	wantAt(t, x, "shop/on-n2", "203.0.113.2:80", "", false)
	wantAt(t, x, "shop/on-n2", "203.0.113.1:80", "10 11", false)
	if r := x.Reach("shop/on-n2", verdict.TCP, netip.MustParseAddrPort("203.0.113.2:80")); !r.Own {
		t.Error("clients are taken for alike whose addresses decide")
	}
	with("'fd00::/8'")
	wantAt(t, x, "shop/on-n2", "203.0.113.2:80", "10 11", false)
}

// TestExternalServicePorts: a pod is told of the UDP ports at external addresses, also where it may use no endpoint, and hears when a pod takes one.
func TestExternalServicePorts(t *testing.T) {
	x := externalWorld(t, "")
	slice := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "other-1", Labels: map[string]string{discoveryv1.LabelServiceName: "other"}},
		AddressType: discoveryv1.AddressTypeIPv4}
	read(t, "[{name: '', port: 53, protocol: UDP}]", &slice.Ports)
	read(t, "[{addresses: [10.64.0.13]}]", &slice.Endpoints)
	svc := serviceOf(t, "other", 0, `{type: NodePort, clusterIPs: [10.96.0.6], ports: [{port: 53, protocol: UDP, nodePort: 30053}, {name: alt, port: 30054, protocol: UDP, nodePort: 30054}],
		externalIPs: [203.0.113.1, 10.64.0.99, 10.64.0.1]}`, "{}")
	if d := apply(t, x, slice, svc); d.External || len(d.Packets) == 0 {
		t.Errorf("%+v", d)
	}
	want := func(list string) {
		t.Helper()
		var got []ServicePort
		for _, s := range x.Packets("shop/on-n1").Services {
			got = append(got, ServicePort{Addr: s.Addr, Endpoints: s.Endpoints})
		}
		if fmt.Sprint(got) != list {
			t.Errorf("%v, want %s", got, list)
		}
		if err := x.Packets("shop/on-n1").Validate(); err != nil {
			t.Error(err)
		}
	}
	const leads = " [10.64.0.13:53] false}"
	const nodes = "{10.64.0.1:53" + leads + " {10.64.0.1:30053" + leads + " {10.64.0.1:30054 [] false}"
	want("[" + nodes + " {10.64.0.99:53" + leads + " {10.64.0.99:30054 [] false} {10.96.0.6:53" + leads + " {203.0.113.1:53" + leads + " {203.0.113.1:30054 [] false}]")
	late := testPod("shop", "late", 99, map[string]string{"app": "late"})
	for _, act := range []func() (Delta, error){func() (Delta, error) { return x.Apply(late) }, func() (Delta, error) { return x.Delete(late) }} {
		d, err := act()
		if err != nil || !slices.Contains(d.Packets, "shop/on-n1") {
			t.Errorf("%v: packets of %v", err, d.Packets)
		}
		if x.pods["shop/late"] != nil {
			want("[" + nodes + " {10.96.0.6:53" + leads + " {203.0.113.1:53" + leads + " {203.0.113.1:30054 [] false}]")
		}
	}
	want("[" + nodes + " {10.64.0.99:53" + leads + " {10.64.0.99:30054 [] false} {10.96.0.6:53" + leads + " {203.0.113.1:53" + leads + " {203.0.113.1:30054 [] false}]")
}
