package e2e

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds"
	"github.com/mantlet/mantlet/xds/server"
)

// aging is a small cluster in which everything that proves an identity ends soon: db admits api, of which there are two.
const aging = `
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}, annotations: {mantlet.dev/server-first: "5432"}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 5432}, {containerPort: 8080}]}]}
---
{apiVersion: v1, kind: Pod, metadata: {name: api-a, namespace: shop, labels: {app: api}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: api-b, namespace: shop, labels: {app: api}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: evil, namespace: shop, labels: {app: evil}}, spec: {containers: [{name: c, image: i}]}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db-from-api, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: api}}}]}]
`

// lifetimes are far shorter than a cluster's. Certificates are renewed long before they end, so that a busy machine does not matter.
var lifetimes = sandbox.Lifetimes{SVID: 10 * time.Second, RenewAfter: time.Second, Sessions: 3 * time.Second}

// TestIdentityInTime: certificates are renewed, roots change, pods are relabelled and deleted, while traffic goes on.
func TestIdentityInTime(t *testing.T) {
	s, m, log := age(t, lifetimes)
	t.Run("renewal", func(t *testing.T) { renewal(t, s) })
	t.Run("relabelled", func(t *testing.T) { relabelled(t, s, m) })
	t.Run("roots", func(t *testing.T) { roots(t, s) })
	t.Run("deleted", func(t *testing.T) { deleted(t, s, log) })
}

func age(t *testing.T, l sandbox.Lifetimes) (*sandbox.Sandbox, *source.Manifests, *journal) {
	t.Helper()
	m := manifests(t, aging)
	log := &journal{}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	s, err := sandbox.Start(ctx, sandbox.Config{
		Manifests: m, Policy: policy.Config{TrustDomain: trustDomain, PodNetwork: m.PodNetwork}, Binaries: binaries(t), Lifetimes: l,
		Log: slog.New(slog.NewTextHandler(log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the control plane's log:\n%s", log)
		}
	})
	return s, m, log
}

// renewal: certificates are renewed again and again under a stream and many short connections; nothing is lost, nothing refused, and new
// handshakes show new certificates.
func renewal(t *testing.T, s *sandbox.Sandbox) {
	db := pod(t, s, "shop/db")
	to := netip.AddrPortFrom(db.Spec().IPs[0], echo)
	stop := traffic(t, pod(t, s, "shop/api-a"), to)
	serials := map[string]bool{}
	await(t, "four certificates of db", func() bool {
		serials[serial(t, s, to)] = true
		return len(serials) == 4
	})
	stop()
	if n := resumed(t, "shop/db"); n == 0 {
		t.Error("no session was resumed between the sidecars")
	}
}

// TestNoResumption: a cluster may have every connection prove its identity anew.
func TestNoResumption(t *testing.T) {
	s, _, _ := age(t, sandbox.Lifetimes{Resumption: xds.NeverResume})
	to := netip.AddrPortFrom(pod(t, s, "shop/db").Spec().IPs[0], banner)
	c := meshTLS(genuine(t, s.Authority(), identityOf(t, s, "shop/api-a")))
	c.ClientSessionCache, c.ServerName = tls.NewLRUClientSessionCache(8), "db"
	for range 2 {
		if again, n := session(t, pod(t, s, "shop/evil"), to, c); again || n == 0 {
			t.Errorf("resumed %t, %d bytes", again, n)
		}
	}
	for i := range 5 {
		if err := once(t.Context(), pod(t, s, "shop/api-a"), netip.AddrPortFrom(to.Addr(), echo), i); err != nil {
			t.Fatal(err)
		}
	}
	if n := resumed(t, "shop/db"); n != 0 {
		t.Errorf("%d sessions were resumed", n)
	}
}

// resumed counts the sessions that the sidecar of a pod has let others resume.
func resumed(t *testing.T, name string) int {
	t.Helper()
	return total(sidecarOf(t, name).stats(t, `^listener\..*_15006\.ssl\.session_reused$`))
}

// serial is the serial number of the certificate that the sidecar at an address shows.
func serial(t *testing.T, s *sandbox.Sandbox, to netip.AddrPort) string {
	t.Helper()
	raw, err := past(t, pod(t, s, "shop/evil"), to)
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, meshTLS(genuine(t, s.Authority(), identityOf(t, s, "shop/api-a"))))
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.Text(16)
}

// traffic keeps one connection of a pod's app talking, and opens short ones all the time, until the returned function is called; that one
// wants all of it to have been answered.
func traffic(t *testing.T, from *netns.Pod, to netip.AddrPort) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	var lines, short atomic.Int64
	begun := make(chan struct{})
	running.Go(func() {
		conn := connect(t, from, to, 1, nil)[0]
		if conn == nil {
			t.Error("the stream is refused")
			close(begun)
			return
		}
		defer conn.Close()
		answers := bufio.NewReader(conn)
		for i := 0; ctx.Err() == nil; i++ {
			_ = conn.SetDeadline(time.Now().Add(patience))
			if err := ask(conn, answers, i); err != nil {
				t.Errorf("the stream broke after %d lines: %v", i, err)
				break
			}
			if lines.Add(1) == 1 {
				close(begun)
			}
		}
	})
	for range 2 {
		running.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				if err := once(ctx, from, to, i); err != nil && ctx.Err() == nil {
					t.Errorf("short connection %d: %v", i, err)
					return
				}
				short.Add(1)
			}
		})
	}
	<-begun
	return func() {
		t.Helper()
		cancel()
		running.Wait()
		t.Logf("%d lines in one connection, %d connections", lines.Load(), short.Load())
		if lines.Load() < 10 || short.Load() < 10 {
			t.Error("too few to prove anything")
		}
	}
}

// once opens a connection and wants one answer.
func once(ctx context.Context, from *netns.Pod, to netip.AddrPort, i int) error {
	conn, err := dialIn(from)(ctx, "tcp", to.String())
	if err != nil {
		return err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	return ask(conn, bufio.NewReader(conn), i)
}

func ask(conn net.Conn, answers *bufio.Reader, i int) error {
	if _, err := fmt.Fprintf(conn, "line %d\n", i); err != nil {
		return err
	}
	answer, err := answers.ReadString('\n')
	if err == nil && !strings.Contains(answer, fmt.Sprintf(`"line %d"`, i)) {
		return fmt.Errorf("the answer to line %d is %q", i, answer)
	}
	return err
}

// relabelled: the labels of running pods change. They have the new identity at once, whatever sessions they had, and under the old one
// nobody is let in from there, not in a resumed session either; under the same identity its twin is.
func relabelled(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) {
	db, a, b := pod(t, s, "shop/db"), pod(t, s, "shop/api-a"), pod(t, s, "shop/api-b")
	to := netip.AddrPortFrom(db.Spec().IPs[0], banner)
	relabel := func(labels string) {
		t.Helper()
		file := filepath.Join(t.TempDir(), "manifests.yaml")
		text := strings.Replace(aging, "{name: api-a, namespace: shop, labels: {app: api}}", "{name: api-a, namespace: shop, labels: "+labels+"}", 1)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		var err error
		if m, err = source.ReadManifests([]string{file}, source.Options{Previous: m}); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Update(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	flow := func() sandbox.Flow {
		t.Helper()
		attempts, err := matrix.Plan(m, matrix.Options{})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range try(t, s, attempts).Flows {
			if f.From == "shop/api-a" && f.To == "shop/db" {
				return f
			}
		}
		return sandbox.Flow{}
	}
	old := identityOf(t, s, "shop/api-a")
	if got := flow().FromID; got != old.String() {
		t.Fatalf("db saw %q, not %s", got, old)
	}
	// What a thief may have of the pod: its certificate, and a session.
	thief := meshTLS(genuine(t, s.Authority(), old))
	thief.ClientSessionCache, thief.ServerName = tls.NewLRUClientSessionCache(64), "db"
	if _, n := session(t, a, to, thief); n == 0 {
		t.Fatal("the certificate is no good to begin with")
	}

	relabel("{app: other}")
	seen := accepted(t, db, banner)
	resumptions := 0
	for range 5 {
		if resumed, n := session(t, a, to, thief); n != 0 {
			t.Errorf("%d bytes under the old identity; resumed: %t", n, resumed)
		} else if resumed {
			resumptions++
		}
	}
	if resumptions == 0 {
		t.Error("no session was resumed: that they are refused is not shown")
	}
	wantNothing(t, probe(t, a, to.Addr(), banner))
	if got := accepted(t, db, banner); got != seen {
		t.Errorf("the app accepted %d connections", got-seen)
	}
	wantReached(t, probe(t, b, to.Addr(), banner), "shop/db")
	if _, n := session(t, b, to, thief); n == 0 {
		t.Error("the identity is refused from the twin's address, too")
	}
	if f := flow(); f.FromID != "" {
		t.Errorf("let in: %+v", f)
	}

	relabel("{app: api, version: \"2\"}")
	if got, want := flow().FromID, identityOf(t, s, "shop/api-a").String(); got != want || got == old.String() {
		t.Errorf("db saw %q, not %s", got, want)
	}
	if _, n := session(t, a, to, thief); n != 0 {
		t.Errorf("%d bytes under the first identity", n)
	}
	relabel("{app: api}")
	if got := flow().FromID; got != old.String() {
		t.Errorf("with its first labels db saw %q, not %s", got, old)
	}
}

// roots: the authority goes over to another root under traffic. Nothing is lost, nothing refused; then the old root is good for nothing, and
// an Envoy that starts anew is let in by the control plane under the new one.
func roots(t *testing.T, s *sandbox.Sandbox) {
	db, a := pod(t, s, "shop/db"), pod(t, s, "shop/api-a")
	to := netip.AddrPortFrom(db.Spec().IPs[0], echo)
	api := identityOf(t, s, "shop/api-a")
	material, err := s.Authority().Material()
	if err != nil {
		t.Fatal(err)
	}
	old, err := ca.Load(ca.Config{TrustDomain: trustDomain}, material)
	if err != nil {
		t.Fatal(err)
	}
	other, err := ca.New(ca.Config{TrustDomain: trustDomain})
	if err != nil {
		t.Fatal(err)
	}
	next, err := other.Material()
	if err != nil {
		t.Fatal(err)
	}
	banners := netip.AddrPortFrom(to.Addr(), banner)
	if _, n := session(t, a, banners, meshTLS(genuine(t, old, api))); n == 0 {
		t.Fatal("the old root's certificates are no good to begin with")
	}
	stop := traffic(t, a, to)
	ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
	defer cancel()
	if err := s.RotateRoot(ctx, next); err != nil {
		t.Fatal(err)
	}
	stop()
	if !s.Authority().Bundle().Equal(other.Bundle()) {
		t.Error("the old root is still trusted")
	}
	if n := steal(t, a, banners, meshTLS(genuine(t, old, api)), ""); n != 0 {
		t.Errorf("%d bytes by a certificate of the old root", n)
	}
	if _, n := session(t, a, banners, meshTLS(genuine(t, s.Authority(), api))); n == 0 {
		t.Error("no byte by a certificate of the new root")
	}
	conn, err := past(t, a, banners)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	shown := tls.Client(conn, meshTLS(genuine(t, s.Authority(), api)))
	if err := shown.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !other.Signed(shown.ConnectionState().PeerCertificates[0]) {
		t.Error("db shows a certificate that the new root has not signed")
	}
	if behind := s.ControlPlane().Behind(); len(behind) > 0 {
		t.Errorf("behind are %v", behind)
	}
	// Envoy starts anew: its stream to the control plane is a new one.
	sc := sidecarOf(t, "shop/db")
	if err := syscall.Kill(sc.envoy, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "another Envoy", func() bool { e := sidecarOf(t, "shop/db").envoy; return e != 0 && e != sc.envoy })
	await(t, "db to be back", func() bool { return once(t.Context(), a, to, 1) == nil })
}

// deleted: a pod is deleted, and its containers run on, which the node may be long in ending. Its agent gets no configuration any more, and no
// new certificate; the one that it has is good until it ends, and no session goes on for longer than it may.
func deleted(t *testing.T, s *sandbox.Sandbox, log *journal) {
	to := netip.AddrPortFrom(pod(t, s, "shop/db").Spec().IPs[0], echo)
	ghost := pod(t, s, "shop/api-b")
	if err := once(t.Context(), ghost, to, 0); err != nil {
		t.Fatalf("before: %v", err)
	}
	// Another pod takes its place, its name and its addresses, before anybody notices: an evil one.
	next := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "api-b", UID: "another", Labels: map[string]string{"app": "evil"},
		Annotations: map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
	for _, a := range ghost.Spec().IPs {
		next.Status.PodIPs = append(next.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if err := s.ControlPlane().Apply(next); err != nil {
		t.Fatal(err)
	}
	await(t, "the stream's end, and a stream and a certificate to be refused", func() bool {
		return strings.Contains(log.String(), "the pod shop/api-b is gone") &&
			strings.Contains(log.String(), `msg="stream refused: not authenticated" error="pod shop/api-b: unknown pod`) &&
			strings.Contains(log.String(), `msg="no identity signed" code=NotFound reason="pod shop/api-b: unknown pod`)
	})
	for _, c := range s.ControlPlane().Server().Ledger().Snapshot() {
		if c.Client == server.Client("shop/api-b") && c.Connected {
			t.Errorf("the pod before it is served what is for its successor: %+v", c)
		}
	}
	refusedInTime(t, func() error { return once(t.Context(), ghost, to, 1) })
	if err := once(t.Context(), pod(t, s, "shop/api-a"), to, 3); err != nil {
		t.Errorf("its twin: %v", err)
	}
}

// refusedInTime tries one connection after the other until they are refused. No certificate of who tries is signed any more: that has to come
// with the end of the one that there is, and of the sessions that may outlive it. Unbounded these would go on for hours.
func refusedInTime(t *testing.T, try func() error) {
	t.Helper()
	const slack = 15 * time.Second // of a busy machine
	began := time.Now()
	bound := lifetimes.SVID + lifetimes.Sessions
	pause := time.NewTicker(10 * time.Millisecond)
	defer pause.Stop()
	for {
		asked := time.Now()
		if err := try(); err != nil {
			t.Logf("refused after %s; the bound is %s: %v", asked.Sub(began).Round(time.Millisecond), bound, err)
			break
		}
		if asked.After(began.Add(bound + slack)) {
			t.Fatalf("let in after %s: its certificate and all sessions had to end within %s", asked.Sub(began).Round(time.Millisecond), bound)
		}
		<-pause.C
	}
	for range 10 {
		if try() == nil {
			t.Fatal("let in again")
		}
	}
}

// journal is a log that a test reads while others write.
type journal struct {
	mu sync.Mutex
	b  strings.Builder
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.Write(p)
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.b.String()
}
