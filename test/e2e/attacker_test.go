package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/names"
)

// besieged is a small cluster under attack. db admits api, caged and the plain pod without sidecar; caged may not go there by its own
// egress policy; vaults are strict and
// isolated from everybody; no policy isolates club, which is strict.
const besieged = `
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: legacy}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: strict, labels: {mantlet.dev/inject: enabled, mantlet.dev/mtls: strict}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: members, labels: {mantlet.dev/inject: enabled, mantlet.dev/mtls: strict}}}
---
apiVersion: v1
kind: Pod
metadata: {name: club, namespace: members, labels: {app: club}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}, annotations: {mantlet.dev/server-first: "5432"}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 5432}, {containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: evil, namespace: shop, labels: {app: evil}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: caged, namespace: shop, labels: {app: caged}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: plain, namespace: legacy, labels: {app: plain}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stranger, namespace: legacy, labels: {app: stranger}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: vault-a, namespace: strict, labels: {app: vault}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: vault-b, namespace: strict, labels: {app: vault}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: vault, namespace: strict}
spec: {selector: {app: vault}, clusterIP: ` + vaultVIP4 + `, clusterIPs: [` + vaultVIP4 + `, "` + vaultVIP6 + `"], ipFamilyPolicy: RequireDualStack, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db-in, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - podSelector: {matchExpressions: [{key: app, operator: In, values: [api, caged]}]}
    - namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: legacy}}
      podSelector: {matchLabels: {app: plain}}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: caged-out, namespace: shop}
spec:
  podSelector: {matchLabels: {app: caged}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {app: evil}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody, namespace: strict}
spec: {podSelector: {}, policyTypes: [Ingress, Egress]}
`

const (
	vaultVIP4 = "10.96.7.7"
	vaultVIP6 = "fd00:10:96::77"

	banner = uint16(5432) // db's port on which the server speaks first
	echo   = uint16(8080) // the other ports: the client speaks first
)

// patience bounds every wait for what must come.
const patience = 20 * time.Second

func besiege(t *testing.T) *sandbox.Sandbox {
	t.Helper()
	return start(t, manifests(t, besieged), matrix.Options{})
}

// pod finds a pod that must be there.
func pod(t *testing.T, s *sandbox.Sandbox, name string) *netns.Pod {
	t.Helper()
	p, ok := s.Pod(name)
	if !ok {
		t.Fatalf("no pod %s", name)
	}
	return p
}

// eachFamily runs a test against a pod's IPv4 and IPv6 address.
func eachFamily(t *testing.T, p *netns.Pod, f func(t *testing.T, a netip.Addr)) {
	t.Helper()
	if len(p.Spec().IPs) != 2 {
		t.Fatalf("%s has the addresses %v, not one of each family", p.Name(), p.Spec().IPs)
	}
	for _, a := range p.Spec().IPs {
		name := "IPv6"
		if a.Is4() {
			name = "IPv4"
		}
		t.Run(name, func(t *testing.T) { f(t, a) })
	}
}

// probe makes one connection from a pod's app, through its sidecar if it has one.
func probe(t *testing.T, from interface {
	Probe(context.Context, []netns.Target) ([]netns.Outcome, error)
}, to netip.Addr, port uint16,
) netns.Outcome {
	t.Helper()
	target := netns.Target{Addr: netip.AddrPortFrom(to, port), Speaks: netns.ClientFirst, Nonce: "hello"}
	if port == banner {
		target.Speaks, target.Nonce = netns.ServerFirst, ""
	}
	out, err := from.Probe(t.Context(), []netns.Target{target})
	if err != nil {
		t.Fatal(err)
	}
	return out[0]
}

// wantReached wants an app to have answered.
func wantReached(t *testing.T, o netns.Outcome, name string) {
	t.Helper()
	if want := fmt.Sprintf("%s:%d", name, o.Target.Addr.Port()); o.Reached != want || o.Err != "" {
		t.Errorf("%s: answered by %q, not by %s (connect: %s; then: %s)", o.Target.Addr, o.Reached, want, o.Connect, o.Err)
	}
}

// wantNothing wants no byte to have come, and an end instead of a wait.
func wantNothing(t *testing.T, o netns.Outcome) {
	t.Helper()
	switch {
	case o.Bytes > 0 || o.Reached != "":
		t.Errorf("%s: %d bytes of %q", o.Target.Addr, o.Bytes, o.Reached)
	case o.Connect == netns.TimedOut || o.Err == netns.TimedOut:
		t.Errorf("%s: neither refused nor closed", o.Target.Addr)
	}
}

// accepted counts what a pod's app has accepted on a port.
func accepted(t *testing.T, p *netns.Pod, port uint16) int {
	t.Helper()
	list, err := p.Connections(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, c := range list {
		if c.Port == port {
			n += c.Count
		}
	}
	return n
}

// unseen runs an attack on a port of db and wants the app not to notice it. An allowed connection comes last: apps accept in order, so
// that all connections before it have been counted too.
func unseen(t *testing.T, s *sandbox.Sandbox, to netip.Addr, port uint16, attack func()) {
	t.Helper()
	db := pod(t, s, "shop/db")
	before := accepted(t, db, port)
	attack()
	wantReached(t, probe(t, pod(t, s, "shop/api"), to, port), "shop/db")
	if got := accepted(t, db, port); got != before+1 {
		t.Errorf("the app on port %d accepted %d connections during the attack", port, got-before-1)
	}
}

// past connects from a pod's network namespace past its sidecar, as who has taken the pod over could.
func past(t *testing.T, from *netns.Pod, to netip.AddrPort) (net.Conn, error) {
	t.Helper()
	var conn net.Conn
	err := from.Do(func() (err error) {
		d := net.Dialer{Control: netfilter.Exempt, Timeout: patience}
		conn, err = d.DialContext(t.Context(), "tcp", to.String())
		return err
	})
	return conn, err
}

// loot sends something, which may be nothing, and reads all that comes back until the other end closes.
func loot(t *testing.T, conn net.Conn, say string) int {
	t.Helper()
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if say != "" {
		_, _ = io.WriteString(conn, say) // that it fails is one way to be refused
	}
	n, err := io.Copy(io.Discard, conn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection was left open")
	}
	return int(n)
}

// steal plays a TLS client past the sidecar of a pod and returns how many bytes of the app it got.
func steal(t *testing.T, from *netns.Pod, to netip.AddrPort, c *tls.Config, say string) int {
	t.Helper()
	raw, err := past(t, from, to)
	if err != nil {
		if errors.Is(err, syscall.ECONNREFUSED) {
			return 0
		}
		t.Fatal(err)
	}
	conn := tls.Client(raw, c)
	_ = conn.SetDeadline(time.Now().Add(patience))
	if err := conn.HandshakeContext(t.Context()); err != nil {
		raw.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error("the handshake was left hanging")
		}
		return 0
	}
	return loot(t, conn, say)
}

// peek plays a TLS client past the sidecar of a pod, wants the handshake to succeed and returns how many bytes of a banner came.
func peek(t *testing.T, from *netns.Pod, to netip.AddrPort, c *tls.Config) int {
	t.Helper()
	raw, err := past(t, from, to)
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, c)
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	n, err := conn.Read(make([]byte, 4096))
	if err != nil && !errors.Is(err, io.EOF) {
		t.Logf("%s: %v", to, err)
	}
	return n
}

// meshTLS is what a sidecar offers, with any certificate or none.
func meshTLS(certs ...tls.Certificate) *tls.Config {
	return &tls.Config{
		InsecureSkipVerify: true, //nolint:gosec // an attacker does not care who answers
		MinVersion:         tls.VersionTLS12,
		NextProtos:         []string{names.ALPN},
		Certificates:       certs,
	}
}

// identityOf is a pod's SPIFFE ID.
func identityOf(t *testing.T, s *sandbox.Sandbox, name string) spiffeid.ID {
	t.Helper()
	id, ok := s.Identity(name)
	if !ok {
		t.Fatalf("no identity of %s", name)
	}
	return id
}

// genuine has an authority sign an SVID.
func genuine(t *testing.T, authority *ca.CA, id spiffeid.ID) tls.Certificate {
	t.Helper()
	key := newKey(t)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := authority.Sign(csr, id)
	if err != nil {
		t.Fatal(err)
	}
	return keyPair(key, chain...)
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func keyPair(key *ecdsa.PrivateKey, chain ...*x509.Certificate) tls.Certificate {
	out := tls.Certificate{PrivateKey: key}
	for _, c := range chain {
		out.Certificate = append(out.Certificate, c.Raw)
	}
	return out
}

// signer is a key with the certificate that it signs under.
type signer struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// stolen is the authority's own key: with it certificates can be made that the authority never would.
func stolen(t *testing.T, authority *ca.CA) signer {
	t.Helper()
	m, err := authority.Material()
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(m.Key)
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	block, _ = pem.Decode(m.Chain)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return signer{key.(*ecdsa.PrivateKey), cert}
}

// forge signs a leaf that is a proper SVID but for what change does to it.
func (s signer) forge(t *testing.T, id spiffeid.ID, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key := newKey(t)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:        []*url.URL{id.URL()},
	}
	change(leaf)
	der, err := x509.CreateCertificate(rand.Reader, leaf, s.cert, key.Public(), s.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return keyPair(key, cert)
}
