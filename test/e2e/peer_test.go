package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/names"
)

// appsWithTLS: an app that speaks TLS itself does so with its client, end to end, with or without sidecars in between.
func appsWithTLS(t *testing.T, s *sandbox.Sandbox) {
	const port = 8443
	db := pod(t, s, "shop/db")
	own := selfSigned(t)
	var l net.Listener
	if err := db.Do(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{own}},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%s over %s", r.Proto, r.TLS.NegotiatedProtocol)
		}),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.ServeTLS(l, "", "")
	}()
	t.Cleanup(func() { server.Close(); <-done })

	eachFamily(t, db, func(t *testing.T, a netip.Addr) {
		url := fmt.Sprintf("https://%s/", netip.AddrPortFrom(a, port))
		for _, name := range []string{"shop/api", "legacy/plain"} {
			body, cert, err := get(t, pod(t, s, name), url)
			if err != nil || body != "HTTP/2.0 over h2" {
				t.Errorf("%s: %q, %v", name, body, err)
			} else if !bytes.Equal(cert.Raw, own.Certificate[0]) {
				t.Errorf("%s saw another certificate than the app's, of %s", name, cert.Subject)
			}
		}
		for _, name := range []string{"shop/evil", "legacy/stranger"} {
			if body, _, err := get(t, pod(t, s, name), url); err == nil {
				t.Errorf("%s got %q", name, body)
			}
		}
	})
}

// get asks over HTTP from a pod, through its sidecar if it has one, and returns the certificate that the other end showed.
func get(t *testing.T, from *netns.Pod, url string) (string, *x509.Certificate, error) {
	t.Helper()
	transport := &http.Transport{
		ForceAttemptHTTP2: true,
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // the certificate is what the caller compares
		DialContext:       dialIn(from),
	}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Get(url)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), resp.TLS.PeerCertificates[0], err
}

func dialIn(from *netns.Pod) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = from.Do(func() (err error) {
			conn, err = new(net.Dialer).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
}

// selfSigned is an app's own certificate, which says nothing to a sidecar.
func selfSigned(t *testing.T) tls.Certificate {
	t.Helper()
	key := newKey(t)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "app"}, DNSNames: []string{"db.shop.svc"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{PrivateKey: key, Certificate: [][]byte{der}}
}

const reused = `
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: client, namespace: shop, labels: {app: client}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: victim, namespace: shop, labels: {app: victim}}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Pod, metadata: {name: impostor, namespace: legacy, labels: {app: impostor}}, spec: {containers: [{name: c, image: i}]}}
`

// TestImpostor: the address of a pod now belongs to somebody else, and the control plane does not know it yet. The client's sidecar goes
// by what the other end proves.
func TestImpostor(t *testing.T) {
	m := manifests(t, reused)
	s := start(t, m, matrix.Options{})
	client, there := pod(t, s, "shop/client"), pod(t, s, "legacy/impostor")
	// No sidecar is there: what arrives nobody captures.
	var victim *corev1.Pod
	for _, p := range m.Objects.Pods {
		switch p.Name {
		case "victim":
			victim = p.DeepCopy()
		case "impostor":
			if err := s.ControlPlane().Delete(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	victim.Status.PodIP, victim.Status.PodIPs = there.Spec().IPs[0].String(), nil
	for _, a := range there.Spec().IPs {
		victim.Status.PodIPs = append(victim.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	if err := s.ControlPlane().Apply(victim); err != nil {
		t.Fatal(err)
	}
	id, root := identityOf(t, s, "shop/victim"), stolen(t, s.Authority())
	other, err := ca.New(ca.Config{TrustDomain: trustDomain})
	if err != nil {
		t.Fatal(err)
	}
	tlsWith := func(c tls.Certificate) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{c}, ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{names.ALPN}}
	}
	cases := []struct {
		name string
		tls  *tls.Config
		port uint16
	}{
		{"the victim itself", tlsWith(genuine(t, s.Authority(), id)), 7000},
		{"another workload", tlsWith(genuine(t, s.Authority(), identityOf(t, s, "shop/client"))), 7001},
		{"the control plane", tlsWith(root.forge(t, identity.ControlPlane(trustDomain), func(*x509.Certificate) {})), 7002},
		{"the victim's name by another authority", tlsWith(genuine(t, other, id)), 7003},
		{"an expired SVID of the victim", tlsWith(root.forge(t, id, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })), 7004},
		{"an app's TLS", tlsWith(selfSigned(t)), 7006},
		{"plaintext", nil, 7007},
	}
	for _, c := range cases {
		got := greet(t, there, c.port, c.tls)
		t.Run(c.name, func(t *testing.T) {
			eachFamily(t, there, func(t *testing.T, a netip.Addr) {
				o := say(t, client, netip.AddrPortFrom(a, c.port), "my password\n")
				switch {
				case c.port == 7000 && (o != "welcome\n" || got.Load() == 0):
					t.Errorf("got %q and the other end %d bytes: what is spoilt below is no good to begin with", o, got.Load())
				case c.port != 7000 && (o != "" || got.Load() != 0):
					t.Errorf("got %q and the other end %d bytes", o, got.Load())
				}
			})
		})
	}
}

// say connects from a pod's app, says something and returns all that comes back.
func say(t *testing.T, from *netns.Pod, to netip.AddrPort, what string) string {
	t.Helper()
	conn, err := dialIn(from)(t.Context(), "tcp", to.String())
	if err != nil {
		return ""
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	_, _ = io.WriteString(conn, what)
	answer, err := io.ReadAll(conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%s was left open", to)
	}
	return string(answer)
}

// greet listens in a pod, speaks first to whoever comes, over TLS or not, and counts the bytes that it is told. With TLS those of the
// handshake do not count; without, a ClientHello is no secret.
func greet(t *testing.T, in *netns.Pod, port uint16, config *tls.Config) *atomic.Int64 {
	t.Helper()
	var l net.Listener
	if err := in.Do(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if config != nil {
		l = tls.NewListener(l, config)
	}
	var told atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(patience))
			_, _ = io.WriteString(conn, "welcome\n")
			buffer := make([]byte, 4096)
			if n, _ := conn.Read(buffer); config != nil || bytes.Contains(buffer, []byte("password")) {
				told.Add(int64(n))
			}
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return &told
}
