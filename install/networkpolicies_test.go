package install

import (
	"maps"
	"net/netip"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
)

// The addresses of a cluster's pods, by "namespace/name"; what is not among them is outside.
var addresses = map[string]netip.Addr{
	"shield/mantlet-a":   netip.MustParseAddr("10.64.0.1"),
	"shield/mantlet-b":   netip.MustParseAddr("10.64.0.2"),
	"shield/debug":       netip.MustParseAddr("10.64.0.3"), // somebody's, in Mantlet's namespace
	"shield/prometheus":  netip.MustParseAddr("10.64.0.4"),
	"shop/web":           netip.MustParseAddr("10.64.0.5"),
	"monitoring/scraper": netip.MustParseAddr("10.64.0.6"),
	"monitoring/other":   netip.MustParseAddr("10.64.0.7"),
	"kube-system/dns":    netip.MustParseAddr("10.64.0.8"),
}

const outside = "outside"

var outsideAddr = netip.MustParseAddr("203.0.113.9") // the API server's, for example

// What the NetworkPolicies of Mantlet's own namespace mean, by Mantlet's evaluator: a peer and a port, and whether it gets there.
func TestOwnNetworkPolicies(t *testing.T) {
	type connection struct {
		from, to string
		proto    verdict.Protocol
		port     uint16
	}
	const a, b = "shield/mantlet-a", "shield/mantlet-b"
	always := map[connection]bool{
		// Sidecars and the API server, wherever they are.
		{"shop/web", a, verdict.TCP, 15012}: true, {"monitoring/other", b, verdict.TCP, 15012}: true, {outside, a, verdict.TCP, 15012}: true,
		{"shop/web", a, verdict.TCP, 15017}: true, {outside, b, verdict.TCP, 15017}: true, {"kube-system/dns", a, verdict.TCP, 15017}: true,
		// At no other port, and in no other protocol.
		{"shop/web", a, verdict.TCP, 443}: false, {"shop/web", a, verdict.TCP, 15011}: false, {"shop/web", a, verdict.TCP, 15013}: false, {outside, a, verdict.TCP, 22}: false,
		{"shop/web", a, verdict.UDP, 15012}: false, {outside, a, verdict.UDP, 15017}: false, {"shop/web", a, verdict.SCTP, 15012}: false,
		// Who has no say in metrics.from.
		{"shop/web", a, verdict.TCP, 15014}: false, {"monitoring/other", a, verdict.TCP, 15014}: false, {"kube-system/dns", b, verdict.TCP, 15014}: false,
		{"shield/prometheus", a, verdict.TCP, 15014}: false,
		// Names, and the API server.
		{a, "kube-system/dns", verdict.UDP, 53}: true, {b, "kube-system/dns", verdict.TCP, 53}: true, {a, outside, verdict.UDP, 53}: true,
		{a, outside, verdict.TCP, 443}: true, {b, outside, verdict.TCP, 6443}: true,
		// Nothing else: neither pods, nor what is outside, nor each other.
		{a, "kube-system/dns", verdict.TCP, 9153}: false, {a, "shop/web", verdict.TCP, 8080}: false, {a, outside, verdict.TCP, 80}: false, {a, outside, verdict.TCP, 22}: false,
		{a, outside, verdict.UDP, 443}: false, {a, outside, verdict.UDP, 6443}: false, {a, outside, verdict.TCP, 2379}: false, {a, outside, verdict.SCTP, 53}: false,
		{a, b, verdict.TCP, 15012}: false, {a, b, verdict.TCP, 15014}: false,
		// Others in the namespace are closed in both directions, to Mantlet too.
		{"shop/web", "shield/debug", verdict.TCP, 8080}: false, {outside, "shield/debug", verdict.TCP, 8080}: false,
		{"shield/debug", "shop/web", verdict.TCP, 8080}: false, {"shield/debug", outside, verdict.TCP, 443}: false, {"shield/debug", "kube-system/dns", verdict.UDP, 53}: false,
		{"shield/debug", a, verdict.TCP, 15012}: false, {"shield/debug", a, verdict.TCP, 15014}: false,
	}
	for _, c := range []struct {
		set  []string
		more map[connection]bool
	}{
		{nil, map[connection]bool{{"monitoring/scraper", a, verdict.TCP, 15014}: false, {outside, a, verdict.TCP, 15014}: false}},
		{[]string{"metrics.from=[{namespaceSelector: {matchLabels: {team: ops}}, podSelector: {matchLabels: {app: prometheus}}}]", "controlPlane.apiServerPorts=[443, 6443, 8443]"}, map[connection]bool{
			{"monitoring/scraper", a, verdict.TCP, 15014}: true, {"monitoring/scraper", b, verdict.TCP, 15014}: true, {"monitoring/scraper", a, verdict.UDP, 15014}: false,
			{"monitoring/scraper", a, verdict.TCP, 8080}: false, {outside, a, verdict.TCP, 15014}: false, {a, outside, verdict.TCP, 8443}: true,
		}},
		{[]string{"metrics.from=[{ipBlock: {cidr: 203.0.113.0/28}}]"}, map[connection]bool{{outside, a, verdict.TCP, 15014}: true, {"monitoring/scraper", a, verdict.TCP, 15014}: false}},
	} {
		for _, capture := range []string{"sidecar", "node"} {
			x := evaluator(t, render(t, Options{Namespace: "shield", Set: append([]string{"capture=" + capture}, c.set...)}))
			wants := maps.Clone(always)
			maps.Copy(wants, c.more)
			for one, want := range wants {
				var got policy.Answer
				switch {
				case one.from == outside:
					got = x.AnswerOutside(outsideAddr, one.proto, netip.AddrPortFrom(addresses[one.to], one.port))
				case one.to == outside:
					got = x.Answer(one.from, one.proto, netip.AddrPortFrom(outsideAddr, one.port))
				default:
					got = x.Answer(one.from, one.proto, netip.AddrPortFrom(addresses[one.to], one.port))
				}
				if got.Allowed != want || got.Always {
					t.Errorf("capture %s, %q: %s → %s:%d/%s is %+v, want allowed %t", capture, c.set, one.from, one.to, one.port, one.proto, got, want)
				}
			}
		}
	}
}

// evaluator knows the policies and namespaces that were rendered, two of the Deployment's pods, and others.
func evaluator(t *testing.T, list []Manifest) *policy.Index {
	t.Helper()
	x := policy.NewIndex(policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"), PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}})
	own := find[corev1.Namespace](t, list, "Namespace")
	objects := []metav1.Object{own}
	for name, labels := range map[string]map[string]string{"shop": {policy.InjectLabel: "enabled"}, "monitoring": {"team": "ops"}, "kube-system": nil} {
		objects = append(objects, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}})
	}
	policies := 0
	for _, m := range list {
		if m.Kind == "NetworkPolicy" {
			objects = append(objects, read[networkingv1.NetworkPolicy](t, m))
			policies++
		}
	}
	if own.Name != "shield" || policies != 2 {
		t.Fatalf("namespace %s with %d policies, want shield with 2", own.Name, policies)
	}
	control := find[appsv1.Deployment](t, list, "Deployment").Spec.Template.Labels
	for name, labels := range map[string]map[string]string{
		"mantlet-a": control, "mantlet-b": control, "debug": {"app.kubernetes.io/name": "mantlet"}, "web": {"app": "web"},
		"scraper": {"app": "prometheus"}, "prometheus": {"app": "prometheus"}, "other": {"app": "other"}, "dns": {"k8s-app": "kube-dns"},
	} {
		objects = append(objects, pod(t, name, labels))
	}
	for _, o := range objects {
		if _, err := x.Apply(o); err != nil {
			t.Fatal(err)
		}
	}
	return x
}

// pod is one of addresses. The evaluator says what sidecars enforce; whoever enforces these policies, a pod network that does, has to come to the same, so
// here all pods count as having one.
func pod(t *testing.T, name string, labels map[string]string) *corev1.Pod {
	t.Helper()
	for _, ns := range []string{"shield", "shop", "monitoring", "kube-system"} {
		if a, ok := addresses[ns+"/"+name]; ok {
			return &corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: labels, Annotations: map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}},
				Status:     corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: a.String()}}},
			}
		}
	}
	t.Fatalf("pod %s has no address", name)
	return nil
}
