package matrix

import (
	"bytes"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/verdict"
)

func TestParseExternal(t *testing.T) {
	for in, want := range map[string]External{
		"203.0.113.0/24":       {netip.MustParsePrefix("203.0.113.0/24"), 443},
		"203.0.113.9/24:8443":  {netip.MustParsePrefix("203.0.113.0/24"), 8443},
		"203.0.113.9":          {netip.MustParsePrefix("203.0.113.9/32"), 443},
		"203.0.113.9:80":       {netip.MustParsePrefix("203.0.113.9/32"), 80},
		"2001:db8::/64":        {netip.MustParsePrefix("2001:db8::/64"), 443},
		"[2001:db8::/64]:8443": {netip.MustParsePrefix("2001:db8::/64"), 8443},
		"[2001:db8::1]":        {netip.MustParsePrefix("2001:db8::1/128"), 443},
	} {
		if got, err := ParseExternal(in); err != nil || got != want {
			t.Errorf("ParseExternal(%q) = %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "x", "203.0.113.0/33", "203.0.113.0/24:0", "203.0.113.0/24:x", "[2001:db8::/64]443", "[2001:db8::/64", "203.0.113.0/24:53/UDP", "a:b",
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
	want := []Listener{{22, false}, {80, false}, {5432, true}, {9000, false}}
	if err != nil || len(got) != len(want) {
		t.Fatalf("%v, %v", got, err)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("listener %d: %v, want %v", i, got[i], want[i])
		}
	}
	if got, _ := Listeners(testPod("true"), nil); !got[0].ServerFirst || !got[1].ServerFirst {
		t.Errorf("true does not mean all: %v", got)
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
	attempts, err := Plan(m, Options{External: []External{{netip.MustParsePrefix("2001:db8::/64"), 443}}})
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
	for what, want := range map[string]int{"shop/db-0 pod": 9, "shop/v4 pod": 6, "shop/db-0 service": 1, "shop/v4 service": 1, "shop/db-0 external": 1, "shop/v4 external": 0} {
		if count[what] != want {
			t.Errorf("%s: %d attempts, want %d", what, count[what], want)
		}
	}
	if _, err := Plan(m, Options{External: []External{{netip.MustParsePrefix("10.64.3.0/24"), 443}}}); err == nil {
		t.Error("an external range inside the pod network is accepted")
	}
}

func TestReportForms(t *testing.T) {
	r := &Report{Connections: []Connection{
		{From: "shop/api-0", To: "shop/db-0", Address: "10.64.0.4", Port: 5432, Protocol: "TCP", Via: ViaPod, Verdict: Allowed, Authenticated: true, Reason: verdict.Reason{Policy: "shop/db", Rule: "ingress[0]", Text: "admits <x>"}},
		{From: "shop/api-0", To: "shop/db-0", Address: "fd00::4", Port: 5432, Protocol: "TCP", Via: ViaPod, Verdict: Denied, Reason: verdict.Reason{Text: "no IPv6"}},
		{From: "shop/web-0", To: "shop/db-0", Address: "10.64.0.4", Port: 5432, Protocol: "TCP", Via: ViaPod, Verdict: Denied, Reason: verdict.Reason{Policy: "shop/db", Text: "near", Nearest: true, Direction: "ingress"}},
		{From: "shop/web-0", To: "shop/db-0", Address: "10.64.0.4", Port: 80, Protocol: "TCP", Via: ViaPod, Verdict: Allowed, Mismatch: "packets say otherwise"},
	}}
	r.Summarize()
	if r.Summary != (Summary{Pods: 2, Connections: 4, Allowed: 2, Denied: 2, Authenticated: 1, Mismatches: 1}) {
		t.Errorf("summary: %+v", r.Summary)
	}
	var j bytes.Buffer
	if err := r.WriteJSON(&j); err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(j.Bytes(), &back); err != nil || len(back.Connections) != 4 || back.Connections[0] != r.Connections[0] || back.Summary != r.Summary {
		t.Errorf("JSON does not read back: %v\n%s", err, &j)
	}
	if !strings.Contains(j.String(), `"text":"admits <x>"`) {
		t.Errorf("JSON escapes for HTML: %s", &j)
	}
	var table bytes.Buffer
	if err := r.WriteTable(&table, Plain, 1); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"½", "!", "×", "MISMATCH shop/web-0 → shop/db-0:80", "Denied:\n  shop/web-0 → shop/db-0:5432\n      near", "and 1 more"} {
		if !strings.Contains(table.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, &table)
		}
	}
	if strings.Contains(table.String(), "\x1b") {
		t.Error("a plain table has colour")
	}
}
