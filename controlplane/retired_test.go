package controlplane

import (
	"context"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mantlet/mantlet/controlplane/policy"
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
