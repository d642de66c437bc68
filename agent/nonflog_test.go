package agent

import (
	"crypto/tls"
	"errors"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/xds/names"
)

// Where the kernel has no NFLOG the agent says so once, and Envoy alone decides inside the cluster: who may connect gets through, who may not is accepted
// and closed without a byte, and nothing arrives. Outside the cluster connect() tells the truth all the same.
func TestAgentWithoutNFLOG(t *testing.T) {
	w := newWorld(t)
	w.cfg.tuneHold = func(c *hold.Config) { c.Binding = func() error { return unix.EINVAL } } // what such a kernel says
	w.app("[::]:8080")
	echo(t, w.outside.Listen(t, "[::]:9090"))
	w.startPlane()
	policy := objects(8080).NetworkPolicies[0]
	policy.Spec.Egress = append(policy.Spec.Egress, networkingv1.NetworkPolicyEgressRule{
		To:    []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "api"}}}},
		Ports: []networkingv1.NetworkPolicyPort{{Port: new(intstr.FromInt32(9092))}},
	})
	if err := w.cp.Apply(policy); err != nil {
		t.Fatal(err)
	}
	w.serve("[::]:9092")
	arrived := w.count("[::]:9093")
	w.startAgent()
	w.ready()
	const warning = "the kernel has no NFLOG (nfnetlink_log)"
	w.log.await(t, "warning", func(s string) bool { return strings.Contains(s, "level=WARN") && strings.Contains(s, warning) })
	for round := range 2 {
		for _, a := range apiAddrs {
			for _, to := range []struct {
				address string
				says    string
			}{{netip.AddrPortFrom(a, 9092).String(), "hello\n"}, {netip.AddrPortFrom(a, 9093).String(), ""}} {
				c, err := dial(t, to.address)
				if err != nil {
					t.Fatalf("attempt %d: %s: %v; Envoy accepts whatever becomes of it", round+1, to.address, err)
				}
				if got := greeted(t, c); got != to.says {
					t.Errorf("attempt %d: %s: %q, not %q", round+1, to.address, got, to.says)
				}
				c.Close()
			}
		}
		for _, a := range []string{"10.99.0.1:9090", "[fd99::1]:9090"} {
			c, err := dial(t, a)
			if err != nil {
				t.Fatal(err)
			}
			if got := greeted(t, c); got != "hello\n" {
				t.Errorf("attempt %d: %s: %q", round+1, a, got)
			}
			c.Close()
		}
		for _, a := range []string{"10.99.0.1:9091", "[fd99::1]:9091"} {
			if _, err := dial(t, a); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("attempt %d: %s: %v, not refused", round+1, a, err)
			}
		}
	}
	if n := arrived.Load(); n != 0 {
		t.Errorf("%d connections arrived where none may", n)
	}
	w.stopAgent()
	text, _ := w.log.read()
	if n := strings.Count(text, warning); n != 1 {
		t.Errorf("it has warned %d times", n)
	}
	if strings.Contains(text, "level=ERROR") {
		t.Error("errors in the log")
	}
	w.refused("after the agent's end")
}

// serve serves outside as shop/api with its sidecar would: whoever proves an identity is greeted.
func (w *world) serve(address string) {
	w.t.Helper()
	cfg := tlsconfig.MTLSServerConfig(w.svid(), w.ca, tlsconfig.AuthorizeMemberOf(w.td))
	cfg.NextProtos = []string{names.ALPN}
	echo(w.t, tls.NewListener(w.outside.Listen(w.t, address), cfg))
}

// count accepts connections outside, and counts them.
func (w *world) count(address string) *atomic.Int32 {
	w.t.Helper()
	l := w.outside.Listen(w.t, address)
	var n atomic.Int32
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			n.Add(1)
			_ = c.Close()
		}
	}()
	w.t.Cleanup(func() { _ = l.Close(); <-ended })
	return &n
}
