package matrix

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/verdict"
)

func TestParseExternal(t *testing.T) {
	for in, want := range map[string]External{
		"203.0.113.0/24":        {netip.MustParsePrefix("203.0.113.0/24"), 443, verdict.TCP},
		"203.0.113.9/24:8443":   {netip.MustParsePrefix("203.0.113.0/24"), 8443, verdict.TCP},
		"203.0.113.9":           {netip.MustParsePrefix("203.0.113.9/32"), 443, verdict.TCP},
		"203.0.113.9:80":        {netip.MustParsePrefix("203.0.113.9/32"), 80, verdict.TCP},
		"2001:db8::/64":         {netip.MustParsePrefix("2001:db8::/64"), 443, verdict.TCP},
		"[2001:db8::/64]:8443":  {netip.MustParsePrefix("2001:db8::/64"), 8443, verdict.TCP},
		"203.0.113.9:53/UDP":    {netip.MustParsePrefix("203.0.113.9/32"), 53, verdict.UDP},
		"[2001:db8::1]:53/SCTP": {netip.MustParsePrefix("2001:db8::1/128"), 53, verdict.SCTP},
		"[2001:db8::1]":         {netip.MustParsePrefix("2001:db8::1/128"), 443, verdict.TCP},
	} {
		if got, err := ParseExternal(in); err != nil || got != want {
			t.Errorf("ParseExternal(%q) = %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "x", "203.0.113.0/33", "203.0.113.0/24:0", "203.0.113.0/24:x", "[2001:db8::/64]443", "[2001:db8::/64", "203.0.113.0/24:53/ICMP", "203.0.113.0/24/UDP", "[2001:db8::1]/UDP", "a:b",
		"127.0.0.0/8", "0.0.0.0", "224.0.0.1", "169.254.1.1", "fe80::1%eth0", "fe80::/10", "::ffff:203.0.113.5", "::1", "255.255.255.255"} {
		if got, err := ParseExternal(in); err == nil {
			t.Errorf("ParseExternal(%q) = %v", in, got)
		}
	}
}

func TestParsePort(t *testing.T) {
	for in, want := range map[string]Port{"80": {80, verdict.TCP}, "80/TCP": {80, verdict.TCP}, "53/UDP": {53, verdict.UDP}} {
		if got, err := ParsePort(in); err != nil || got != want {
			t.Errorf("ParsePort(%q) = %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "0", "65536", "-1", "80/ICMP", "080", "8 0", "http"} {
		if got, err := ParsePort(in); err == nil {
			t.Errorf("ParsePort(%q) = %v", in, got)
		}
	}
}

func testPod(annotation string) *corev1.Pod {
	always := corev1.ContainerRestartPolicyAlways
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db-0"},
		Spec: corev1.PodSpec{
			Containers:     []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 5432}, {ContainerPort: 53, Protocol: "UDP"}, {ContainerPort: 80, Protocol: "TCP"}}}},
			InitContainers: []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 1}}}, {RestartPolicy: &always, Ports: []corev1.ContainerPort{{ContainerPort: 9000}}}},
		},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.64.0.4"}, {IP: "fd00:10:64::4"}}},
	}
	if annotation != "" {
		p.Annotations = map[string]string{ServerFirstAnnotation: annotation}
	}
	return p
}

func TestListeners(t *testing.T) {
	got, err := Listeners(testPod("5432"), []Port{{22, verdict.TCP}, {80, verdict.TCP}})
	want := []Listener{{22, verdict.TCP, false}, {53, verdict.UDP, false}, {80, verdict.TCP, false}, {5432, verdict.TCP, true}, {9000, verdict.TCP, false}}
	if err != nil || len(got) != len(want) {
		t.Fatalf("%v, %v", got, err)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("listener %d: %v, want %v", i, got[i], want[i])
		}
	}
	got, err = Listeners(testPod("true"), []Port{{53, verdict.TCP}})
	if err != nil || len(got) != 5 {
		t.Fatalf("%v, %v", got, err)
	}
	for _, l := range got {
		if l.ServerFirst != (l.Protocol == verdict.TCP) {
			t.Errorf("true means all TCP ports and no others: %v", got)
		}
	}
	for _, bad := range []string{"5433", "x", "5432,", "53"} {
		if got, err := Listeners(testPod(bad), nil); err == nil {
			t.Errorf("annotation %q: %v", bad, got)
		}
	}
}

func TestPlanKeepsFamiliesApart(t *testing.T) {
	v4 := testPod("")
	v4.Name, v4.Status.PodIPs = "v4", []corev1.PodIP{{IP: "10.64.0.5"}}
	m := &source.Manifests{PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}
	m.Objects.Pods = []*corev1.Pod{testPod(""), v4}
	m.Objects.Services = []*corev1.Service{
		{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "headless"}, Spec: corev1.ServiceSpec{ClusterIPs: []string{"None"}, Ports: []corev1.ServicePort{{Port: 1}}}},
		{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "dns"}, Spec: corev1.ServiceSpec{ClusterIPs: []string{"10.96.0.1"}, Ports: []corev1.ServicePort{{Port: 53, Protocol: "UDP"}, {Port: 53}}}},
	}
	attempts, err := Plan(m, Options{External: []External{{netip.MustParsePrefix("2001:db8::/64"), 443, verdict.TCP}}})
	if err != nil {
		t.Fatal(err)
	}
	count := map[string]int{}
	for _, a := range attempts {
		count[a.From+" "+string(a.Via)]++
		if a.From == "shop/v4" && a.Addr.Addr().Is6() {
			t.Errorf("a pod without IPv6 tries %v", a)
		}
	}
	for what, want := range map[string]int{"shop/db-0 pod": 12, "shop/v4 pod": 8, "shop/db-0 service": 2, "shop/v4 service": 2, "shop/db-0 external": 1, "shop/v4 external": 0} {
		if count[what] != want {
			t.Errorf("%s: %d attempts, want %d", what, count[what], want)
		}
	}
	if _, err := Plan(m, Options{External: []External{{netip.MustParsePrefix("10.64.3.0/24"), 443, verdict.TCP}}}); err == nil {
		t.Error("an external range inside the pod network is accepted")
	}
}

func TestReportForms(t *testing.T) {
	r := &Report{Connections: []Connection{
		{From: "shop/api-0", To: "shop/db-0", Address: "10.64.0.4", Port: 5432, Protocol: "TCP", Via: ViaPod, Verdict: Allowed, Authenticated: true, Reason: verdict.Reason{Policy: "shop/db", Rule: "ingress[0]", Text: "admits <x>"}},
		{From: "shop/api-0", To: "shop/db-0", Address: "fd00::4", Port: 5432, Protocol: "TCP", Via: ViaPod, Verdict: Denied, Reason: verdict.Reason{Text: "no IPv6"}},
		{From: "shop/web-0", To: "shop/db-0", Address: "10.64.0.4", Port: 5432, Protocol: "TCP", Via: ViaPod, Verdict: Denied, Reason: verdict.Reason{Policy: "shop/db", Text: "near", Nearest: true, Direction: "ingress"}},
		{From: "shop/web-0", To: "shop/db-0", Address: "10.64.0.4", Port: 80, EnforcedBy: ByIdentity, Protocol: "TCP", Via: ViaPod, Verdict: Allowed, Mismatch: "packets say otherwise"},
		{From: "shop/web-0", To: "dns/coredns-0", Address: "10.64.0.4", Port: 53, Protocol: "UDP", Via: ViaService, Verdict: Allowed, EnforcedBy: ByAddress},
	}}
	r.Summarize()
	if r.Summary != (Summary{Pods: 2, Connections: 5, Allowed: 3, Denied: 2, Authenticated: 1, Mismatches: 1}) {
		t.Errorf("summary: %+v", r.Summary)
	}
	var j bytes.Buffer
	if err := r.WriteJSON(&j); err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(j.Bytes(), &back); err != nil || len(back.Connections) != 5 || back.Connections[0] != r.Connections[0] || back.Summary != r.Summary {
		t.Errorf("JSON does not read back: %v\n%s", err, &j)
	}
	if strings.Contains(j.String(), `"bytes"`) {
		t.Errorf("nothing was tried, and JSON speaks of bytes: %s", &j)
	}
	if !strings.Contains(j.String(), `"text":"admits <x>"`) {
		t.Errorf("JSON escapes for HTML: %s", &j)
	}
	tried := *r
	tried.Connections = []Connection{{From: "a/b", To: "a/c", Protocol: "UDP", Verdict: Denied, Observed: &Observed{Datagram: Silence}},
		{From: "a/b", To: "a/c", Protocol: "TCP", Verdict: Denied, Observed: &Observed{Connect: Refused}}}
	j.Reset()
	if err := tried.WriteJSON(&j); err != nil || !strings.Contains(j.String(), `"datagram":"silence","bytes":0`) || !strings.Contains(j.String(), `"connect":"refused","bytes":0`) {
		t.Errorf("what packets met with is not in the JSON: %s, %v", &j, err)
	}
	var table bytes.Buffer
	if err := r.WriteTable(&table, Plain, 1); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"½", "!", "×", "MISMATCH shop/web-0 → shop/db-0:80", "Denied:\n  shop/web-0 → shop/db-0:5432\n      near", "and 1 more", " 1  shop/db-0:5432\n", " 3  dns/coredns-0:53/UDP (service)\n", "by address"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, &table)
		}
	}
	if strings.Contains(table.String(), "\x1b") {
		t.Error("a plain table has colour")
	}
}

func TestEnforcedBy(t *testing.T) {
	type end struct {
		name    string
		sidecar bool
	}
	guarded, open, nobody := end{"a/guarded", true}, end{"a/open", false}, end{}
	other := end{"b/guarded", true}
	for _, c := range []struct {
		proto    verdict.Protocol
		from, to end
		want     EnforcedBy
	}{
		{verdict.TCP, guarded, other, ByIdentity},
		{verdict.UDP, guarded, other, ByAddress},
		{verdict.SCTP, guarded, other, ByAddress},
		{verdict.TCP, guarded, open, ByAddress},
		{verdict.TCP, open, guarded, ByAddress},
		{verdict.UDP, open, guarded, ByAddress},
		{verdict.TCP, guarded, nobody, ByAddress},
		{verdict.TCP, open, nobody, ByNobody},
		{verdict.UDP, open, end{"b/open", false}, ByNobody},
		{verdict.TCP, guarded, guarded, ByNobody},
	} {
		from, to := policy.Pod{Name: c.from.name, Sidecar: c.from.sidecar}, policy.Endpoint{Pod: c.to.name, Sidecar: c.to.sidecar}
		if got := enforcedBy(c.proto, from, to); got != c.want {
			t.Errorf("%s from %v to %v: by %s, want %s", c.proto, c.from, c.to, got, c.want)
		}
	}
}
