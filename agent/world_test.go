package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mantlet/mantlet/agent/envoy"
	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

func TestMain(m *testing.M) { os.Exit(podtest.Main(m)) }

// world is a pod, shop/db, with a real agent and Envoy, and outside of it a real control plane and a peer, shop/api, that speaks mTLS.
//
// Policy: shop/api may connect to shop/db on port 8080; shop/db may connect to 10.99.0.1 and fd99::1 on port 9090.
type world struct {
	t        *testing.T
	outside  *podtest.Outside
	td       spiffeid.TrustDomain
	ca       *ca.CA
	minter   *attest.Minter
	api      spiffeid.ID
	cfg      Config
	log      *lines
	flows    *lines
	plane    *grpc.Server
	cp       *controlplane.ControlPlane
	cancel   context.CancelFunc
	ended    chan error
	finished bool
}

const planeAddress = "10.99.0.1:15010"

// newWorld makes everything but starts neither agent nor control plane.
func newWorld(t *testing.T) *world {
	t.Helper()
	t.Cleanup(func() { goleak.VerifyNone(t) })
	w := &world{t: t, outside: podtest.Connect(t), td: spiffeid.RequireTrustDomainFromString("td.example"),
		minter: attest.NewMinter(attest.MinterConfig{}), log: newLines(), flows: newLines()}
	elsewhere(t, w.outside)
	var err error
	if w.ca, err = ca.New(ca.Config{TrustDomain: w.td}); err != nil {
		t.Fatal(err)
	}
	token, _, err := w.minter.Mint(attest.Pod{Namespace: "shop", Name: "db", UID: "uid-db"}, attest.Audience)
	if err != nil {
		t.Fatal(err)
	}
	exempt := envoy.OwnUser
	if podtest.SingleUser() {
		exempt = envoy.SharedUser
	}
	w.cfg = Config{
		Pod: "shop/db", ControlPlane: planeAddress, TrustDomain: w.td, Bundle: w.ca.Bundle(), Token: func() (string, error) { return token, nil },
		Envoy: podtest.Envoy(t), RunDir: podtest.Dir(t) + "/run", Flows: w.flows, Exempt: exempt, DrainTimeout: time.Minute, EnvoyLog: w.log,
		Logger: slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	t.Cleanup(func() {
		if t.Failed() {
			text, _ := w.log.read()
			flows, _ := w.flows.read()
			t.Logf("log:\n%s\nflows:\n%s", text, flows)
		}
	})
	return w
}

// objects are the world as Kubernetes has it.
func objects(ports ...int32) *policy.Objects {
	pod := func(name string, ips ...string) *corev1.Pod {
		p := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"app": name},
				Annotations: map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}},
			Spec:   corev1.PodSpec{ServiceAccountName: name},
			Status: corev1.PodStatus{Phase: corev1.PodRunning},
		}
		for _, ip := range ips {
			p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip})
		}
		return p
	}
	db, api := pod("db", "10.99.0.2", "fd99::2"), pod("api", "10.98.0.1", "fd98::1")
	tcp := corev1.ProtocolTCP
	var allowed []networkingv1.NetworkPolicyPort
	for _, p := range ports {
		port := intstr.FromInt32(p)
		allowed = append(allowed, networkingv1.NetworkPolicyPort{Protocol: &tcp, Port: &port})
	}
	out := intstr.FromInt32(9090)
	return &policy.Objects{
		Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{policy.InjectLabel: "enabled"}}}},
		Pods:       []*corev1.Pod{db, api},
		NetworkPolicies: []*networkingv1.NetworkPolicy{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db"},
			Spec: networkingv1.NetworkPolicySpec{
				PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "db"}},
				PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
				Ingress: []networkingv1.NetworkPolicyIngressRule{{
					From:  []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "api"}}}},
					Ports: allowed,
				}},
				Egress: []networkingv1.NetworkPolicyEgressRule{{
					To: []networkingv1.NetworkPolicyPeer{
						{IPBlock: &networkingv1.IPBlock{CIDR: "10.99.0.1/32"}}, {IPBlock: &networkingv1.IPBlock{CIDR: "fd99::1/128"}}},
					Ports: []networkingv1.NetworkPolicyPort{{Protocol: &tcp, Port: &out}},
				}},
			},
		}},
	}
}

// startPlane starts the control plane outside.
func (w *world) startPlane() {
	w.t.Helper()
	cp, g, err := controlplane.NewServer(controlplane.Config{
		Policy: policy.Config{TrustDomain: w.td, PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.98.0.0/16"), netip.MustParsePrefix("fd98::/64")}},
	}, w.ca, w.minter, server.Config{}, []netip.Addr{podtest.OutsideIPv4})
	if err != nil {
		w.t.Fatal(err)
	}
	if err := cp.Load(objects(8080)); err != nil {
		w.t.Fatal(err)
	}
	if w.api, err = cp.Identity(attest.Pod{Namespace: "shop", Name: "api", UID: "uid-api"}); err != nil {
		w.t.Fatal(err)
	}
	l := w.outside.Listen(w.t, planeAddress)
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	w.cp, w.plane = cp, g
	stop := sync.OnceFunc(func() {
		cp.Close()
		g.Stop()
		<-served
	})
	w.t.Cleanup(stop)
}

// stopPlane takes the control plane away.
func (w *world) stopPlane() {
	w.cp.Server().Close()
	w.plane.Stop()
}

// startAgent starts the agent in the pod.
func (w *world) startAgent() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel, w.ended = cancel, make(chan error, 1)
	go func() { w.ended <- Run(ctx, w.cfg) }()
	w.t.Cleanup(func() {
		if !w.finished {
			w.stopAgent()
		}
		cleanRedirect(w.t)
	})
}

// stopAgent stops the agent and waits for its end.
func (w *world) stopAgent() {
	w.t.Helper()
	w.cancel()
	w.finished = true
	select {
	case err := <-w.ended:
		if err != nil {
			w.t.Errorf("agent: %v", err)
		}
	case <-time.After(patience):
		w.t.Error("the agent does not end")
	}
}

// ready waits until the agent says that the pod is enforced.
func (w *world) ready() {
	w.t.Helper()
	// The status socket is there once the agent's first line is.
	w.log.await(w.t, "start of envoy", func(s string) bool { return bytes.Contains([]byte(s), []byte("envoy: started")) })
	if err := Ready(w.t.Context(), w.cfg.RunDir, patience); err != nil {
		w.t.Fatal(err)
	}
}

// echo serves an app that greets and then echoes, until the test ends.
func echo(t *testing.T, l net.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				_, _ = io.WriteString(c, "hello\n")
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

// app serves the app in the pod.
func (w *world) app(address string) {
	w.t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		w.t.Fatal(err)
	}
	echo(w.t, l)
}

// svid is one of shop/api.
func (w *world) svid() *x509svid.SVID {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		w.t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		w.t.Fatal(err)
	}
	chain, err := w.ca.Sign(csr, w.api)
	if err != nil {
		w.t.Fatal(err)
	}
	return &x509svid.SVID{ID: w.api, Certificates: chain, PrivateKey: key}
}

// peer dials from outside as shop/api's sidecar would.
func (w *world) peer(address string) (net.Conn, error) {
	w.t.Helper()
	cfg := tlsconfig.MTLSClientConfig(w.svid(), w.ca, tlsconfig.AuthorizeMemberOf(w.td))
	cfg.NextProtos = []string{names.ALPN}
	var conn net.Conn
	var err error
	w.outside.Do(func() { conn, err = apiDialer(address).Dial("tcp", address) })
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(func() { _ = conn.Close() })
	session := tls.Client(conn, cfg)
	_ = session.SetDeadline(time.Now().Add(patience))
	if err := session.Handshake(); err != nil {
		return nil, err
	}
	return session, nil
}

// greeted reads the app's greeting; "" where the connection ends without one.
func greeted(t *testing.T, c net.Conn) string {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(patience))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read: %v", err)
	}
	return line
}

// say sends a word and wants it back.
func say(t *testing.T, c net.Conn, word string) {
	t.Helper()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, word); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(word))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != word {
		t.Fatalf("echo of %q: %q, %v", word, got, err)
	}
}

// dial dials from the pod.
func dial(t *testing.T, address string) (net.Conn, error) {
	t.Helper()
	c, err := net.DialTimeout("tcp", address, patience)
	if err == nil {
		t.Cleanup(func() { _ = c.Close() })
	}
	return c, err
}

// refused wants a dial from the pod and one from outside to be refused.
func (w *world) refused(when string) {
	w.t.Helper()
	for _, address := range []string{"10.99.0.1:9090", "[fd99::1]:9090"} {
		if _, err := dial(w.t, address); !errors.Is(err, syscall.ECONNREFUSED) {
			w.t.Errorf("%s: from the pod to %s: %v, not refused", when, address, err)
		}
	}
	for _, address := range []string{"10.99.0.2:8080", "[fd99::2]:8080"} {
		var c net.Conn
		var err error
		w.outside.Do(func() { c, err = net.DialTimeout("tcp", address, patience) })
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			w.t.Errorf("%s: from outside to %s: %v, not refused", when, address, err)
		}
	}
}

// record waits for the flow record that ok wants.
func (w *world) record(what string, ok func(flows.Record) bool) flows.Record {
	w.t.Helper()
	var found flows.Record
	w.flows.await(w.t, "flow record of "+what, func(text string) bool {
		for _, line := range bytes.Split([]byte(text), []byte("\n")) {
			if len(line) == 0 {
				continue
			}
			var r flows.Record
			if err := json.Unmarshal(line, &r); err != nil {
				w.t.Fatalf("flow record %s: %v", line, err)
			}
			if ok(r) {
				found = r
				return true
			}
		}
		return false
	})
	return found
}
