package controlplane

import (
	"context"
	"crypto/x509"
	"net/netip"
	"net/url"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/server"
)

type noStreams struct{}

func (noStreams) Authenticate(context.Context) (server.Client, error) { return "", context.Canceled }

func injected(name, app, uid, ip string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID(uid), Labels: map[string]string{"app": app},
			Annotations: map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: ip}}},
	}
}

// TestRelabelledPodIsRetired: under its old identity a relabelled pod is refused for as long as a certificate for that can be good; its twin is
// not, and a pod that is replaced or deleted is none of that.
func TestRelabelledPodIsRetired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cp, err := New(Config{SVIDTTL: time.Hour, Policy: policy.Config{
			TrustDomain: spiffeid.RequireTrustDomainFromString("td.example"), PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}},
			server.Config{Authenticator: noStreams{}})
		if err != nil {
			t.Fatal(err)
		}
		defer cp.Close()
		if err := cp.Load(&policy.Objects{
			Pods: []*corev1.Pod{injected("db", "db", "1", "10.64.0.1"), injected("api-a", "api", "2", "10.64.0.2"), injected("api-b", "api", "3", "10.64.0.3"), injected("api-c", "api", "4", "10.64.0.4")},
			NetworkPolicies: []*networkingv1.NetworkPolicy{{
				ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db"},
				Spec: networkingv1.NetworkPolicySpec{
					PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}},
					Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
						{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "api"}}}}}},
				},
			}},
		}); err != nil {
			t.Fatal(err)
		}
		api := cp.index.Subject("shop/api-a").ID
		admits := func(addr string) bool {
			cp.mu.Lock()
			defer cp.mu.Unlock()
			v := cp.index.Verdicts(cp.index.Subject("shop/db").Key)
			return verdict.NewIngress(v).Admits(verdict.TCP, 80, verdict.Peer{ID: api, Addr: netip.MustParseAddr(addr)})
		}
		if err := cp.Apply(injected("api-a", "other", "2", "10.64.0.2")); err != nil { // relabelled
			t.Fatal(err)
		}
		if err := cp.Update([]metav1.Object{injected("api-b", "other", "9", "10.64.0.3")}, nil); err != nil { // another pod of that name
			t.Fatal(err)
		}
		began := time.Now()
		if admits("10.64.0.2") || !admits("10.64.0.3") || !admits("10.64.0.4") {
			t.Error("not exactly the relabelled pod is refused under its old identity")
		}
		<-time.After(time.Hour + retiredMargin - time.Second)
		synctest.Wait()
		if admits("10.64.0.2") {
			t.Errorf("admitted after %s, and a certificate may still be good", time.Since(began))
		}
		<-time.After(2 * time.Second)
		synctest.Wait()
		if !admits("10.64.0.2") {
			t.Error("it is never forgotten")
		}
		if err := cp.Delete(injected("api-c", "api", "4", "10.64.0.4")); err != nil {
			t.Fatal(err)
		}
		if _, ok := cp.index.NextExpiry(); ok {
			t.Error("a deleted pod is retired: its workload scales, and everybody is pushed")
		}
		// A control plane that ends waits for nothing.
		if err := cp.Apply(injected("db", "db2", "1", "10.64.0.1")); err != nil {
			t.Fatal(err)
		}
	})
}

// ledger is Records that note what they are given.
type ledger struct{ given []policy.Retirement }

func (l *ledger) Record(r policy.Retirement)        { l.given = append(l.given, r) }
func (*ledger) Await(context.Context, string) error { return nil }
func (l *ledger) take() (list []policy.Retirement)  { list, l.given = l.given, nil; return list }

// TestShown: a certificate that a pod shows counts as what it had before if it can be just that, and is older than the control plane.
func TestShown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		td := spiffeid.RequireTrustDomainFromString("td.example")
		old := time.Now()
		<-time.After(10 * time.Minute)
		records := &ledger{}
		cp, err := New(Config{SVIDTTL: time.Hour, Records: records, Policy: policy.Config{TrustDomain: td, PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}},
			server.Config{Authenticator: noStreams{}})
		if err != nil {
			t.Fatal(err)
		}
		defer cp.Close()
		if err := cp.Load(&policy.Objects{Pods: []*corev1.Pod{injected("api", "other", "1", "10.64.0.2")}}); err != nil {
			t.Fatal(err)
		}
		is := cp.index.Subject("shop/api").ID
		id := func(path string) spiffeid.ID { return spiffeid.RequireFromPath(td, path) }
		was := id("/ns/shop/sa/default/labels/00000000000000000000000000000001")
		leaf := func(id spiffeid.ID, signed time.Time) *x509.Certificate {
			return &x509.Certificate{URIs: []*url.URL{id.URL()}, NotBefore: signed.Add(-ca.Skew), KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true}
		}
		pod := attest.Pod{Namespace: "shop", Name: "api", UID: "1"}
		for name, c := range map[string]struct {
			pod  attest.Pod
			leaf *x509.Certificate
		}{
			"another namespace's":       {pod, leaf(id("/ns/lab/sa/default/labels/00000000000000000000000000000001"), old)},
			"another service account's": {pod, leaf(id("/ns/shop/sa/other/labels/00000000000000000000000000000001"), old)},
			"the control plane's":       {pod, leaf(id("/mantlet/control-plane"), old)},
			"its own":                   {pod, leaf(is, old)},
			"signed since":              {pod, leaf(was, time.Now().Add(time.Second))},
			"another pod of that name":  {attest.Pod{Namespace: "shop", Name: "api", UID: "2"}, leaf(was, old)},
			"no pod":                    {attest.Pod{Namespace: "shop", Name: "none", UID: "1"}, leaf(was, old)},
		} {
			cp.shown(c.pod, c.leaf)
			if list := records.take(); len(list) > 0 {
				t.Errorf("%s: retired is %v", name, list)
			}
		}
		cp.shown(pod, leaf(was, old))
		until, ok := cp.index.Retired(was, netip.MustParseAddr("10.64.0.2"))
		if list := records.take(); !ok || len(list) != 1 || list[0].ID != was || list[0].UID != "1" || !list[0].Until.Equal(until) || !until.Equal(time.Now().Add(RetiredFor(time.Hour))) {
			t.Errorf("not retired until an hour and a quarter from now: %v, %s", list, until)
		}
		cp.shown(pod, leaf(was, old))
		if list := records.take(); len(list) > 0 {
			t.Errorf("retired again: %v", list)
		}
	})
}

// unaddressed is a pod that has no address yet.
func unaddressed(app string) *corev1.Pod {
	p := injected("new", app, "2", "10.64.0.3")
	p.Status.PodIPs = nil
	return p
}

// TestRetiredForLonger: a certificate that was given for longer than they are valid now is refused for as long.
func TestRetiredForLonger(t *testing.T) {
	records := &ledger{}
	cp, err := New(Config{SVIDTTL: time.Hour, Records: records, Policy: policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("td.example")}}, server.Config{Authenticator: noStreams{}})
	if err != nil {
		t.Fatal(err)
	}
	defer cp.Close()
	if err := cp.Load(&policy.Objects{Pods: []*corev1.Pod{injected("api", "api", "1", "10.64.0.2"), unaddressed("api")}}); err != nil {
		t.Fatal(err)
	}
	end := time.Now().Add(24 * time.Hour)
	cp.given["shop/api"] = given{uid: "1", until: end}
	if err := cp.Apply(injected("api", "other", "1", "10.64.0.2")); err != nil {
		t.Fatal(err)
	}
	if list := records.take(); len(list) != 1 || !list[0].Until.Equal(end.Add(retiredMargin)) {
		t.Errorf("retired is %v", list)
	}
	if err := cp.Apply(unaddressed("other")); err != nil {
		t.Fatal(err)
	}
	if list := records.take(); len(list) > 0 {
		t.Errorf("a pod that has no address yet is retired from nowhere: %v", list)
	}
}
