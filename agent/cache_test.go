package agent

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/xds/server"
)

// The destinations of these tests: two pods without sidecars, and an address that nobody has. The pod may connect to the first.
var (
	friend   = netip.MustParseAddrPort("10.98.0.9:9090")
	stranger = netip.MustParseAddrPort("10.98.0.10:9090")
	nobody   = netip.MustParseAddrPort("10.98.0.11:9090")
)

// destinations makes the pods' addresses and apps outside.
func (w *world) destinations() {
	w.t.Helper()
	w.outside.Do(func() {
		link, err := netlink.LinkByName("peer0")
		for _, d := range []netip.AddrPort{friend, stranger, nobody} {
			if err == nil {
				err = netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: d.Addr().AsSlice(), Mask: net.CIDRMask(32, 32)}})
			}
		}
		if err != nil {
			w.t.Fatal(err)
		}
	})
	link, err := netlink.LinkByName("eth0")
	if err == nil {
		err = netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP("10.99.0.1"),
			Dst: &net.IPNet{IP: net.IPv4(10, 98, 0, 0), Mask: net.CIDRMask(16, 32)}})
	}
	if err != nil {
		w.t.Fatal(err)
	}
	for _, d := range []netip.AddrPort{friend, stranger, nobody} {
		echo(w.t, w.outside.Listen(w.t, d.String()))
	}
}

// startPlaneWithDestinations starts a control plane that knows the pods.
func (w *world) startPlaneWithDestinations() {
	w.t.Helper()
	w.startPlane()
	for name, d := range map[string]netip.AddrPort{"friend": friend, "stranger": stranger} {
		w.apply(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"app": name}},
			Spec:       corev1.PodSpec{ServiceAccountName: name},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: d.Addr().String()}}},
		})
	}
	w.apply(mayReach("friend"))
}

func (w *world) apply(o metav1.Object) {
	w.t.Helper()
	if err := w.cp.Apply(o); err != nil {
		w.t.Fatal(err)
	}
}

// mayReach is a policy that lets the pod connect to an app.
func mayReach(app string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "reach"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
			Egress: []networkingv1.NetworkPolicyEgressRule{{
				To: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}}},
			}},
		},
	}
}

// reach connects from the pod and returns the greeting, "" where the connection is closed or refused, and how long that took.
func reach(t *testing.T, d netip.AddrPort) (greeting string, took time.Duration) {
	t.Helper()
	began := time.Now()
	c, err := dial(t, d.String())
	if errors.Is(err, syscall.ECONNREFUSED) {
		return "", time.Since(began)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return greeted(t, c), time.Since(began)
}

// reaches wants a destination to be reachable, or not.
func reaches(t *testing.T, when string, d netip.AddrPort, want string) {
	t.Helper()
	got, took := reach(t, d)
	t.Logf("%s: %s: %q after %s", when, d, got, took.Round(100*time.Microsecond))
	if got != want {
		t.Errorf("%s: %s answers %q, want %q", when, d, got, want)
	}
}

// adminOf asks the admin interface of the Envoy that runs.
func (w *world) adminOf(path string) string {
	w.t.Helper()
	var socket string
	if err := filepath.WalkDir(EnvoyDir(w.cfg.RunDir), func(p string, _ fs.DirEntry, err error) error {
		if filepath.Base(p) == "admin.sock" {
			socket = p
		}
		return err
	}); err != nil || socket == "" {
		w.t.Fatalf("no admin socket: %v", err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	resp, err := client.Get("http://envoy" + path)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return string(b)
}

// holdsCluster reports whether Envoy has an on-demand cluster.
func (w *world) holdsCluster(d netip.AddrPort) bool {
	return strings.Contains(w.adminOf("/config_dump?resource=dynamic_active_clusters"), `"od|`+d.String()+`"`)
}

// sentAgain wants a control plane that has come back to have sent nothing but at most so many clusters.
func (w *world) sentAgain(when string, clusters uint64) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	if err := w.cp.Server().Ledger().Wait(ctx, "shop/db"); err != nil {
		w.t.Fatal(err)
	}
	for url, n := range w.cp.Server().Ledger().Totals() {
		want := uint64(0)
		if url == server.ClusterType {
			want = clusters
		}
		if n.Resources > want {
			w.t.Errorf("%s: %d resources of %s were sent, want at most %d", when, n.Resources, url, want)
		}
	}
}

// Envoy is killed while there is no control plane: what was allowed is allowed again, and what was denied denied, at once. When the
// control plane is back nothing is sent again.
func TestEnvoyDiesWithoutControlPlane(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	w.destinations()
	w.startPlaneWithDestinations()
	w.startAgent()
	w.ready()
	all := func(when string) {
		t.Helper()
		reaches(t, when, friend, "hello\n")
		reaches(t, when, stranger, "")
		c, err := w.peer("10.99.0.2:8080")
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		defer c.Close()
		if got := greeted(t, c); got != "hello\n" {
			t.Errorf("%s: the app says %q to its peer", when, got)
		}
	}
	w.log.await(t, "readiness", func(s string) bool { return strings.Contains(s, "agent: ready") })
	all("before")

	w.stopPlane()
	w.log.await(t, "loss", func(s string) bool { return strings.Contains(s, "lost the control plane") })
	killEnvoy(t, w)
	began := time.Now()
	w.log.await(t, "readiness again", func(s string) bool { return strings.Count(s, "agent: ready") == 2 })
	t.Logf("ready again %s after envoy was killed", time.Since(began).Round(time.Millisecond))
	all("without a control plane")
	reaches(t, "unknown, first", nobody, "")
	reaches(t, "unknown, again", nobody, "")

	w.startPlaneWithDestinations()
	w.sentAgain("after both were away", 1) // the denied one: without a SYN hold nobody keeps it
	all("afterwards")

	// The other way round: Envoy is killed and the control plane is there. It is asked again, and has nothing to say either.
	killEnvoy(t, w)
	w.log.await(t, "readiness once more", func(s string) bool { return strings.Count(s, "agent: ready") == 3 })
	w.sentAgain("after envoy was away", 1) // as before
	all("in the end")
}

// run runs parts.
func (w *world) run(a *agent) {
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel, w.ended = cancel, make(chan error, 1)
	go func() { w.ended <- a.run(ctx, time.Now()) }()
	w.t.Cleanup(func() {
		if !w.finished {
			w.stopAgent()
		}
		cleanRedirect(w.t)
	})
}

// The agent asks about destinations: what is allowed is in Envoy when the answer comes, what is denied costs Envoy nothing, changes are told,
// and what is forgotten is gone and comes back.
func TestQuestions(t *testing.T) {
	w := newWorld(t)
	w.destinations()
	w.startPlaneWithDestinations()
	a, err := prepare(w.cfg)
	if err != nil {
		t.Fatal(err)
	}
	told := make(chan map[netip.AddrPort]relay.Verdict, 16)
	a.relay.OnDestinations(func(news map[netip.AddrPort]relay.Verdict) {
		a.kernel.flip(news)
		told <- news
	})
	w.run(a)
	w.ready()
	ask := func(d netip.AddrPort, want bool) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		began := time.Now()
		got, err := a.relay.Ask(ctx, d)
		t.Logf("%s: %t, %v after %s", d, got, err, time.Since(began).Round(10*time.Microsecond))
		if err != nil || got != want {
			t.Errorf("%s: %t, %v; want %t", d, got, err, want)
		}
	}
	holds := func(d netip.AddrPort, want bool) {
		t.Helper()
		if got := w.holdsCluster(d); got != want {
			t.Errorf("envoy holds the cluster of %s: %t, want %t", d, got, want)
		}
	}
	ask(friend, true)
	ask(stranger, false)
	ask(nobody, false)
	holds(friend, true)
	holds(stranger, false)
	holds(nobody, false)
	reaches(t, "asked about", friend, "hello\n")

	w.apply(mayReach("stranger"))
	both := map[netip.AddrPort]relay.Verdict{}
	for len(both) < 2 {
		for d, v := range <-told {
			both[d] = v
		}
	}
	if both[friend] != relay.Denied || both[stranger] != relay.Unknown {
		t.Errorf("told %v", both)
	}
	holds(stranger, false) // before somebody wants to go there
	reaches(t, "now allowed", stranger, "hello\n")
	reaches(t, "now denied", friend, "")
	w.apply(mayReach("friend"))
	for clear(both); len(both) < 2; {
		for d, v := range <-told {
			both[d] = v
		}
	}
	if both[friend] != relay.Unknown || both[stranger] != relay.Denied {
		t.Errorf("told %v", both)
	}
	lets := func(d netip.AddrPort) {
		t.Helper()
		for deadline := time.Now().Add(patience); w.holdsCluster(d); time.Sleep(time.Millisecond) { //nolint:forbidigo // there is no event for what Envoy holds
			if time.Now().After(deadline) {
				t.Fatalf("envoy still holds the cluster of %s", d)
			}
		}
	}
	lets(friend)
	reaches(t, "allowed again", friend, "hello\n")

	a.relay.Forget([]netip.AddrPort{friend, stranger, nobody})
	for deadline := time.Now().Add(patience); w.holdsCluster(friend) || w.holdsCluster(stranger) || len(w.cp.Server().Subscriptions("shop/db")) > 0; {
		if time.Now().After(deadline) {
			t.Fatalf("forgotten and still there; subscriptions %q", w.cp.Server().Subscriptions("shop/db"))
		}
	}
	ask(friend, true)
	reaches(t, "forgotten and asked again", friend, "hello\n")
	if s := w.adminOf("/stats?filter=^tcp.mesh.on_demand_cluster_attempt$"); !strings.HasPrefix(s, "tcp.mesh.on_demand_cluster_attempt: 0") {
		t.Errorf("envoy had to ask for itself: %s", s)
	}

	// Forgotten, and Envoy comes to ask: it waits for the answer, no longer.
	a.relay.Forget([]netip.AddrPort{friend})
	lets(friend)
	reaches(t, "forgotten and not asked", friend, "hello\n")
	ask(friend, true)

	w.stopPlane()
	for a.relay.Trouble() == "" {
		time.Sleep(time.Millisecond) //nolint:forbidigo // there is no event for a text that changes
	}
	ask(friend, true) // known
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if got, err := a.relay.Ask(ctx, stranger); err == nil || got || ctx.Err() != nil || !strings.Contains(err.Error(), "control plane") {
		t.Errorf("unknown, without a control plane: %t, %v", got, err)
	}
	reaches(t, "without a control plane", friend, "hello\n")
	if len(told) > 0 {
		t.Errorf("told %v", <-told)
	}
}
