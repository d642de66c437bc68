package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/verdict"
)

var testConfig = Config{
	TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"),
	PodNetwork:  []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16"), netip.MustParsePrefix("fd00:10:64::/64")},
}

// testPod is a pod with a sidecar; n is the last part of its addresses.
func testPod(namespace, name string, n int, labels map[string]string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels, Annotations: map[string]string{SidecarAnnotation: SidecarInjected}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Ports: []corev1.ContainerPort{{Name: "db", ContainerPort: 5432}}}}},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: fmt.Sprintf("10.64.0.%d", n)}, {IP: fmt.Sprintf("fd00:10:64::%d", n)}},
			HostIPs: []corev1.HostIP{{IP: "10.64.0.1"}}},
	}
}

func testPolicy(t *testing.T, text string) *networkingv1.NetworkPolicy {
	t.Helper()
	np := &networkingv1.NetworkPolicy{}
	if err := yaml.UnmarshalStrict([]byte(text), np); err != nil {
		t.Fatal(err)
	}
	return np
}

func apply(t *testing.T, x *Index, objs ...metav1.Object) Delta {
	t.Helper()
	var last Delta
	for _, o := range objs {
		d, err := x.Apply(o)
		if err != nil {
			t.Fatal(err)
		}
		last = d
	}
	return last
}

const dbFromAPI = `
metadata: {name: db-from-api, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: api}}}], ports: [{port: db}]}]
`

func shop(t *testing.T) *Index {
	x := NewIndex(testConfig)
	apply(t, x,
		testPolicy(t, dbFromAPI),
		testPod("shop", "web-0", 2, map[string]string{"app": "web"}),
		testPod("shop", "api-0", 3, map[string]string{"app": "api"}),
		testPod("shop", "db-0", 4, map[string]string{"app": "db"}),
		testPod("other", "x-0", 5, map[string]string{"app": "x"}))
	compileAll(x)
	return x
}

func compileAll(x *Index) {
	for _, k := range x.SubjectKeys() {
		x.Verdicts(k)
	}
}

func TestAnswerNamesPolicyRuleAndNearestMiss(t *testing.T) {
	x := shop(t)
	for _, c := range []struct {
		from, to string
		allowed  bool
		policy   string
		text     string
	}{
		{"shop/api-0", "10.64.0.4:5432", true, "shop/db-from-api", "ingress[0] of shop/db-from-api admits"},
		{"shop/api-0", "[fd00:10:64::4]:5432", true, "shop/db-from-api", "ingress[0]"},
		{"shop/api-0", "10.64.0.4:5433", false, "shop/db-from-api", "port 5433/TCP is not db/TCP (db is 5432)"},
		{"shop/web-0", "10.64.0.4:5432", false, "shop/db-from-api", "shop/web-0 is not among them"},
		{"shop/web-0", "10.64.0.3:80", true, "", "no policy isolates"},
		{"shop/db-0", "10.64.0.4:1", true, "", "itself"},
		{"shop/db-0", "10.64.0.1:1", true, "", "own node"},
		{"shop/db-0", "10.64.0.99:1", false, "", "no pod has the address"},
		{"shop/db-0", "203.0.113.1:443", true, "", "no policy isolates"},
	} {
		a := x.Answer(c.from, verdict.TCP, netip.MustParseAddrPort(c.to))
		if a.Allowed != c.allowed || a.Reason.Policy != c.policy || !strings.Contains(a.Reason.Text, c.text) {
			t.Errorf("%s → %s: %+v, want allowed=%v by %q: …%s…", c.from, c.to, a, c.allowed, c.policy, c.text)
		}
	}
}

func TestChangesCompileOnlyWhatTheyTouch(t *testing.T) {
	x := shop(t)
	step := func(what string, want int, obj metav1.Object) {
		t.Helper()
		before := x.Compiles()
		apply(t, x, obj)
		compileAll(x)
		if got := x.Compiles() - before; got != want {
			t.Errorf("%s: %d compilations, want %d", what, got, want)
		}
	}
	step("a second replica of the peer", 0, testPod("shop", "api-1", 6, map[string]string{"app": "api"}))
	step("a second replica of the subject", 0, testPod("shop", "db-1", 7, map[string]string{"app": "db"}))
	step("the same policy again", 1, testPolicy(t, dbFromAPI))
	step("a policy that selects web", 1, testPolicy(t, "metadata: {name: w, namespace: shop}\nspec: {podSelector: {matchLabels: {app: web}}}"))
	step("a namespace label nobody selects", 0, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "other", Labels: map[string]string{"a": "b"}}})
	// Its own subject, and db: the selector of db covers the new identity.
	step("a new identity that a rule selects", 2, testPod("shop", "api-v2-0", 8, map[string]string{"app": "api", "v": "2"}))
	// api itself, and db, whose verdict on api includes api's egress.
	step("an egress policy on the peer", 3, testPolicy(t, "metadata: {name: e, namespace: shop}\nspec: {podSelector: {matchLabels: {app: api}}, policyTypes: [Egress]}"))
	if a := x.Answer("shop/api-0", verdict.TCP, netip.MustParseAddrPort("10.64.0.4:5432")); a.Allowed {
		t.Errorf("egress-isolated api still reaches db: %+v", a)
	}
	v := x.Verdicts(x.Subject("shop/db-0").Key)
	api := x.Subject("shop/api-0").ID
	if d := verdict.NewIngress(v).Decide(verdict.TCP, 5432, verdict.Peer{ID: api, Addr: netip.MustParseAddr("10.64.0.3")}); d.Allowed || d.Reason.Policy != "shop/e" {
		t.Errorf("the destination does not hold the peer's egress policy against it: %+v", d)
	}
}
