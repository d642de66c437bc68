package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// revoked is a world with sidecars (shop) and without (legacy).
func revoked() string {
	var b strings.Builder
	b.WriteString("{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}}\n")
	for _, p := range []string{"shop/db", "shop/api", "shop/web", "legacy/plain", "legacy/other", "legacy/sink"} {
		ns, name, _ := strings.Cut(p, "/")
		fmt.Fprintf(&b, "---\n{apiVersion: v1, kind: Pod, metadata: {name: %s, namespace: %s, labels: {app: %s}}, spec: {containers: [{name: c, image: i}]}}\n", name, ns, name)
	}
	return b.String()
}

// isolating makes a policy for pods of shop.
func isolating(app string, types ...networkingv1.PolicyType) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: app + "-" + strings.ToLower(string(types[0]))},
		Spec:       networkingv1.NetworkPolicySpec{PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}, PolicyTypes: types},
	}
}

// peers are pods by app, of any namespace, or prefixes.
func peers(list ...string) (out []networkingv1.NetworkPolicyPeer) {
	for _, p := range list {
		if _, err := netip.ParsePrefix(p); err == nil {
			out = append(out, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: p}})
			continue
		}
		out = append(out, networkingv1.NetworkPolicyPeer{
			NamespaceSelector: &metav1.LabelSelector{}, PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": p}}})
	}
	return out
}

func onPorts(list ...int32) (out []networkingv1.NetworkPolicyPort) {
	for _, p := range list {
		port := intstr.FromInt32(p)
		out = append(out, networkingv1.NetworkPolicyPort{Port: &port})
	}
	return out
}

// admit adds a rule to a policy of one direction; no ports: all.
func admit(p *networkingv1.NetworkPolicy, who []networkingv1.NetworkPolicyPeer, ports ...int32) *networkingv1.NetworkPolicy {
	p = p.DeepCopy()
	if p.Spec.PolicyTypes[0] == networkingv1.PolicyTypeIngress {
		p.Spec.Ingress = append(p.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: who, Ports: onPorts(ports...)})
	} else {
		p.Spec.Egress = append(p.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: who, Ports: onPorts(ports...)})
	}
	return p
}

// cutAtMost is far more than a cut takes on a busy machine (100 ms is the aim), and less than whatever else would end a connection: the agent's
// look at conntrack, keepalives, timeouts of Envoy.
const cutAtMost = 2 * time.Second

// TestRevocation narrows and widens policy under open connections: those that it no longer allows are cut, whichever end has to do it,
// and of the others not a byte is lost. The log says how long after the ACK; BenchmarkRevocation measures it.
func TestRevocation(t *testing.T) {
	const near, far, far6 = "203.0.113.0/25", "203.0.113.128/25", "2001:db8:2::/64"
	options := matrix.Options{}
	for _, p := range []string{near, far, far6} {
		options.External = append(options.External, matrix.External{Prefix: netip.MustParsePrefix(p), Port: 443, Protocol: verdict.TCP})
	}
	s := start(t, manifests(t, revoked()), options)
	var took []time.Duration        // from ACKs to cuts
	streams := map[string]*stream{} // by "from to:port family"
	open := func(from, to string, port uint16) {
		t.Helper()
		target := pod(t, s, to)
		for _, a := range target.Spec().IPs {
			name := fmt.Sprintf("%s %s:%d %s", from, to, port, familyOf(a))
			streams[name] = openStream(t, name, pod(t, s, from), target, netip.AddrPortFrom(a, port))
		}
	}
	outside := func(from, prefix, addr string) {
		t.Helper()
		x, ok := s.External(netip.MustParsePrefix(prefix))
		if !ok {
			t.Fatalf("no outside %s", prefix)
		}
		a := netip.MustParseAddr(addr)
		name := fmt.Sprintf("%s %s %s", from, prefix, familyOf(a))
		streams[name] = openStream(t, name, pod(t, s, from), x, netip.AddrPortFrom(a, 9001))
	}
	for _, from := range []string{"shop/api", "shop/web", "legacy/plain", "legacy/other"} {
		open(from, "shop/db", 9001)
	}
	open("shop/api", "shop/db", 9002)
	open("shop/api", "legacy/sink", 9001)
	open("shop/web", "legacy/sink", 9001)
	open("shop/api", "shop/web", 9003)
	open("shop/web", "shop/api", 9003)
	outside("shop/api", near, "203.0.113.7")
	outside("shop/api", far, "203.0.113.200")
	outside("shop/api", far6, "2001:db8:2::7")

	live := func(prefixes ...string) (list []*stream) {
		for name, st := range streams {
			if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p+" ") }) {
				list = append(list, st)
			}
		}
		return list
	}
	// step applies a change; exactly the named streams end, cut by the sidecar of a pod.
	step := func(what string, change func() error, by string, cut ...string) {
		t.Helper()
		if err := change(); err != nil {
			t.Fatal(err)
		}
		confirmed(t, s, "shop/db", "shop/api", "shop/web")
		doomed := live(cut...)
		if want := 2 * len(cut); len(doomed) < len(cut) || len(doomed) > want {
			t.Fatalf("%s: %d streams to be cut by the names %v", what, len(doomed), cut)
		}
		for _, st := range doomed {
			at := st.gone(t)
			after := at.Sub(ackedAt(t, s, by))
			took = append(took, after)
			t.Logf("%s: %s cut %s after the ACK, as the client sees it: %v", what, st.name, after.Round(10*time.Microsecond), st.err)
			if after > cutAtMost {
				t.Errorf("%s: %s was cut only %s after the ACK: was it by the ACK?", what, st.name, after)
			}
			// Between two sidecars it is up to the client's Envoy whether it passes a reset on as such.
			if st.err == nil && (!strings.HasPrefix(st.name, "shop/") || !strings.Contains(st.name, by+":")) {
				t.Errorf("%s: the client takes the cut for the end of what there was to read", st.name)
			}
			delete(streams, st.name)
		}
		for _, st := range streams {
			st.alive(t)
		}
	}
	cp := s.ControlPlane()
	apply := func(p *networkingv1.NetworkPolicy) func() error { return func() error { return cp.Apply(p) } }
	remove := func(p *networkingv1.NetworkPolicy) func() error { return func() error { return cp.Delete(p) } }
	in, out := networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress

	db := isolating("db", in)
	all := admit(db, peers("api", "web", "plain", "other"))
	step("db is isolated and admits all who are there", apply(all), "")
	step("db no longer admits web", apply(admit(db, peers("api", "plain", "other"))), "shop/db", "shop/web shop/db:9001")
	step("db admits api on one port only", apply(admit(admit(db, peers("api"), 9001), peers("plain", "other"))), "shop/db", "shop/api shop/db:9002")
	step("db no longer admits a pod without sidecar", apply(admit(admit(db, peers("api"), 9001), peers("plain"))), "shop/db", "legacy/other shop/db:9001")
	step("db admits more", apply(all), "")

	api := isolating("api", out)
	step("api is isolated and may go where it is", apply(admit(api, peers("db", "web", "sink", near, far, far6))), "")
	step("api may no longer go to a pod without sidecar", apply(admit(api, peers("db", "web", near, far, far6))), "shop/api", "shop/api legacy/sink:9001")
	step("api may no longer go to web, which nothing isolates", apply(admit(api, peers("db", near, far, far6))), "shop/api", "shop/api shop/web:9003")
	step("api may no longer go to some of the outside", apply(admit(api, peers("db", near))), "shop/api", "shop/api "+far, "shop/api "+far6)
	web := isolating("web", out)
	step("web may go nowhere", apply(web), "shop/web", "shop/web legacy/sink:9001", "shop/web shop/api:9003")
	step("web is no longer isolated", remove(web), "")
	step("api may go to db on another port only", apply(admit(api, peers("db", near), 9002, 443)), "shop/api", "shop/api shop/db:9001", "shop/api "+near)
	step("api is no longer isolated", remove(api), "")

	for _, st := range streams {
		st.finish(t)
	}
	slices.Sort(took)
	t.Logf("%d cuts: %s after the ACK (median), %s (last)", len(took), took[len(took)/2].Round(10*time.Microsecond), took[len(took)-1].Round(10*time.Microsecond))
	if len(streams) != 2 {
		t.Errorf("%d streams are left of 2: the test proves less than it says", len(streams))
	}
}

func familyOf(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// ackedAt is when a pod's agent confirmed the verdicts that it holds.
func ackedAt(t testing.TB, s *sandbox.Sandbox, pod string) time.Time {
	t.Helper()
	for _, st := range s.ControlPlane().Server().Ledger().Snapshot() {
		if st.Client != server.Client(pod) {
			continue
		}
		for _, r := range st.Resources {
			if r.Name == names.Verdicts {
				return r.AckedAt
			}
		}
	}
	t.Fatalf("%s has confirmed no verdicts", pod)
	return time.Time{}
}

// TestRevocationUnderFire opens connections without pause while policy admits them and admits them not, in turn. Whatever was opened while
// it was denied, or a moment before, is cut; what was opened while it was allowed lives until it is denied again.
func TestRevocationUnderFire(t *testing.T) {
	const rounds = 30
	s := start(t, manifests(t, revoked()), matrix.Options{})
	db := pod(t, s, "shop/db")
	policy := isolating("db", networkingv1.PolicyTypeIngress)
	opened := int64(0)
	for i := range rounds {
		if err := s.ControlPlane().Apply(admit(policy, peers("web"))); err != nil {
			t.Fatal(err)
		}
		confirmed(t, s, "shop/db", "shop/web")
		crowd := rush(t, pod(t, s, "shop/web"), db, netip.AddrPortFrom(db.Spec().IPs[i%2], 9001))
		await(t, "connections to be opened", func() bool { return crowd.opened.Load() >= 10 })
		if n := crowd.ended.Load(); n > 0 {
			t.Errorf("round %d: %d connections were cut while policy allowed them", i, n)
		}
		if err := s.ControlPlane().Apply(policy); err != nil {
			t.Fatal(err)
		}
		confirmed(t, s, "shop/db", "shop/web")
		crowd.stop()
		await(t, "all that was opened to be cut", func() bool { return crowd.ended.Load() == crowd.opened.Load() })
		opened += crowd.opened.Load()
		crowd.end()
	}
	t.Logf("%d connections", opened)
}

// siege opens connections without pause.
type siege struct {
	opened, ended atomic.Int64
	halt          chan struct{}
	stop, end     func() // no more are opened; and those that are open are closed
	done          sync.WaitGroup
	conns         []net.Conn // of the one goroutine that opens
}

// rush begins to open connections, each of which waits for its end.
func rush(t *testing.T, from, to place, at netip.AddrPort) *siege {
	t.Helper()
	var l net.Listener
	if err := to.Do(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", at.Port()))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	c := &siege{halt: make(chan struct{})}
	c.done.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			c.done.Go(func() { // the app talks first and then listens
				defer conn.Close()
				_, _ = conn.Write([]byte("welcome"))
				_, _ = io.Copy(io.Discard, conn)
			})
		}
	})
	opening := make(chan struct{})
	c.done.Go(func() {
		defer close(opening)
		_ = from.Do(func() error {
			for {
				select {
				case <-c.halt:
					return nil
				case <-time.After(time.Millisecond):
				}
				conn, err := net.DialTimeout("tcp", at.String(), patience)
				if err != nil {
					continue // refused
				}
				c.conns = append(c.conns, conn)
				c.opened.Add(1)
				c.done.Go(func() {
					_, _ = io.Copy(io.Discard, conn)
					c.ended.Add(1)
				})
			}
		})
	})
	c.stop = sync.OnceFunc(func() {
		close(c.halt)
		<-opening
	})
	c.end = sync.OnceFunc(func() {
		c.stop()
		l.Close()
		for _, conn := range c.conns {
			conn.Close()
		}
		c.done.Wait()
	})
	t.Cleanup(c.end)
	return c
}

// BenchmarkRevocation measures from the ACK of narrower verdicts until the client learns that its connection was cut.
//
//	go test ./test/e2e -run '^$' -bench Revocation -benchtime 100x
func BenchmarkRevocation(b *testing.B) {
	s := start(b, manifests(b, revoked()), matrix.Options{})
	web, _ := s.Pod("shop/web")
	db, _ := s.Pod("shop/db")
	policy := isolating("db", networkingv1.PolicyTypeIngress)
	change := func(p *networkingv1.NetworkPolicy) {
		if err := s.ControlPlane().Apply(p); err != nil {
			b.Fatal(err)
		}
		confirmed(b, s, "shop/db")
	}
	var took []time.Duration
	for i := range b.N {
		change(admit(policy, peers("web")))
		st := openStream(b, "web", web, db, netip.AddrPortFrom(db.Spec().IPs[i%2], uint16(10000+i%1000)))
		st.alive(b)
		change(policy)
		took = append(took, st.gone(b).Sub(ackedAt(b, s, "shop/db")))
	}
	slices.Sort(took)
	at := func(q float64) float64 { return float64(took[int(q*float64(len(took)-1))].Microseconds()) / 1000 }
	b.ReportMetric(at(0.5), "p50-ms")
	b.ReportMetric(at(0.99), "p99-ms")
	b.ReportMetric(0, "ns/op")
}
