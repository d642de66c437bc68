package ca

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mantlet/mantlet/identity"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("mantlet.local")
	web   = spiffeid.RequireFromString("spiffe://mantlet.local/ns/shop/sa/web/labels/0123456789abcdef0123456789abcdef")
	start = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
)

// clock is a clock that tests set.
type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func newCA(t *testing.T, c *clock) *CA {
	t.Helper()
	a, err := New(Config{TrustDomain: td, Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func p256(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(t *testing.T, template *x509.CertificateRequest, key any) *x509.CertificateRequest {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func TestRoot(t *testing.T) {
	c := newCA(t, &clock{start})
	roots := c.Bundle().X509Authorities()
	if len(roots) != 1 {
		t.Fatalf("%d roots", len(roots))
	}
	r := roots[0]
	switch {
	case !r.IsCA || !r.BasicConstraintsValid || r.MaxPathLen != 1:
		t.Errorf("CA %v, path length %d", r.IsCA, r.MaxPathLen)
	case r.KeyUsage&x509.KeyUsageCertSign == 0 || r.KeyUsage&x509.KeyUsageDigitalSignature != 0:
		t.Errorf("key usage %b", r.KeyUsage)
	case len(r.URIs) != 1 || r.URIs[0].String() != "spiffe://mantlet.local":
		t.Errorf("URIs %v", r.URIs)
	case !r.NotBefore.Equal(start.Add(-time.Minute)) || !r.NotAfter.Equal(start.Add(RootTTL)):
		t.Errorf("valid from %s to %s", r.NotBefore, r.NotAfter)
	case r.PublicKey.(*ecdsa.PublicKey).Curve != elliptic.P256():
		t.Error("not P-256")
	}
}

func TestLeafIsAnX509SVID(t *testing.T) {
	c, key := newCA(t, &clock{start}), p256(t)
	chain, err := c.Sign(request(t, &x509.CertificateRequest{}, key), web)
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := x509svid.Verify(chain, c.Bundle(), x509svid.WithTime(start))
	if err != nil || id != web {
		t.Fatalf("Verify: %s, %v", id, err)
	}
	leaf := chain[0]
	if len(chain) != 1 || leaf.IsCA || !leaf.BasicConstraintsValid {
		t.Errorf("a chain of %d, CA %v", len(chain), leaf.IsCA)
	}
	if !leaf.NotBefore.Equal(start.Add(-time.Minute)) || !leaf.NotAfter.Equal(start.Add(time.Hour)) {
		t.Errorf("valid from %s to %s", leaf.NotBefore, leaf.NotAfter)
	}
	if leaf.KeyUsage != x509.KeyUsageDigitalSignature {
		t.Errorf("key usage %b", leaf.KeyUsage)
	}
	if want := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}; !slices.Equal(leaf.ExtKeyUsage, want) {
		t.Errorf("extended key usage %v", leaf.ExtKeyUsage)
	}
	if !key.PublicKey.Equal(leaf.PublicKey) {
		t.Error("another public key")
	}
	// RFC 5280, section 4.2.1.6: with an empty subject the alternative name is critical.
	for _, e := range leaf.Extensions {
		if e.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) && !e.Critical {
			t.Error("the subject alternative name is not critical, though there is no subject")
		}
	}
	again, err := c.Sign(request(t, &x509.CertificateRequest{}, key), web)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := leaf.SerialNumber, again[0].SerialNumber; a.Cmp(b) == 0 || a.BitLen() > 128 || a.BitLen() < 64 {
		t.Errorf("serial numbers %x and %x", a, b)
	}
}

// A requester that asks for more gets nothing of it.
func TestOnlyThePublicKeyIsTakenFromARequest(t *testing.T) {
	c := newCA(t, &clock{start})
	evil, _ := url.Parse("spiffe://mantlet.local/mantlet/control-plane")
	csr := request(t, &x509.CertificateRequest{
		Subject:  pkix.Name{CommonName: "control-plane"},
		URIs:     []*url.URL{evil},
		DNSNames: []string{"control-plane.mantlet"},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true,
			Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}}, // CA:true
	}, p256(t))
	chain, err := c.Sign(csr, web)
	if err != nil {
		t.Fatal(err)
	}
	leaf := chain[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != web.String() || leaf.DNSNames != nil || leaf.IsCA || leaf.Subject.String() != "" {
		t.Errorf("signed %v, %v, CA %v, subject %q", leaf.URIs, leaf.DNSNames, leaf.IsCA, leaf.Subject)
	}
}

func TestSignRefuses(t *testing.T) {
	c := newCA(t, &clock{start})
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	rsaKey, _ := rsa.GenerateKey(rand.Reader, 2048)
	good := p256(t)
	tampered := request(t, &x509.CertificateRequest{}, good)
	tampered.Signature[len(tampered.Signature)-1] ^= 1
	stolen := request(t, &x509.CertificateRequest{}, good)
	stolen.PublicKey = &p256(t).PublicKey
	for _, tc := range []struct {
		name  string
		csr   *x509.CertificateRequest
		id    spiffeid.ID
		isKey bool
		text  string
	}{
		{"P-384", request(t, &x509.CertificateRequest{}, p384), web, true, "ECDSA P-384; use ECDSA P-256"},
		{"Ed25519", request(t, &x509.CertificateRequest{}, ed), web, true, "ed25519.PublicKey; use ECDSA P-256"},
		{"RSA", request(t, &x509.CertificateRequest{}, rsaKey), web, true, "use ECDSA P-256"},
		{"bad signature", tampered, web, true, "not signed with its own key"},
		{"another's key", stolen, web, true, "not signed with its own key"},
		{"control plane", request(t, &x509.CertificateRequest{}, good), identity.ControlPlane(td), false, "not of the form"},
		{"trust domain itself", request(t, &x509.CertificateRequest{}, good), td.ID(), false, "not of the form"},
		{"zero ID", request(t, &x509.CertificateRequest{}, good), spiffeid.ID{}, false, "not of the form"},
		{"other trust domain", request(t, &x509.CertificateRequest{}, good),
			spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString("other"), web.Path()), false, "not in trust domain"},
	} {
		chain, err := c.Sign(tc.csr, tc.id)
		if err == nil || chain != nil || errors.Is(err, ErrKey) != tc.isKey || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v, %v; want an error with %q", tc.name, chain, err, tc.text)
		}
	}
}

func TestLeafDoesNotOutliveTheRoot(t *testing.T) {
	now := &clock{start}
	c := newCA(t, now)
	end := c.Bundle().X509Authorities()[0].NotAfter
	now.t = end.Add(-10 * time.Minute)
	chain, err := c.Sign(request(t, &x509.CertificateRequest{}, p256(t)), web)
	if err != nil || !chain[0].NotAfter.Equal(end) {
		t.Errorf("valid to %v, root to %s: %v", chain, end, err)
	}
	now.t = end.Add(time.Second)
	if _, err := c.Sign(request(t, &x509.CertificateRequest{}, p256(t)), web); err == nil {
		t.Error("signs with an expired root")
	}
}

func TestConfigRefused(t *testing.T) {
	if _, err := New(Config{}); err == nil {
		t.Error("no trust domain: no error")
	}
	for _, ttl := range []time.Duration{-time.Hour, time.Millisecond} {
		if _, err := New(Config{TrustDomain: td, TTL: ttl}); err == nil {
			t.Errorf("TTL %s: no error", ttl)
		}
	}
}

func TestServerCertificate(t *testing.T) {
	now := &clock{start}
	c := newCA(t, now)
	s, err := c.NewServer([]string{"mantlet.mantlet-system.svc"}, []netip.Addr{netip.MustParseAddr("10.64.0.1"), netip.MustParseAddr("fd00::1")})
	if err != nil {
		t.Fatal(err)
	}
	first, err := s.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := x509svid.Verify(first.Certificates, c, x509svid.WithTime(now.t))
	if err != nil || id.String() != "spiffe://mantlet.local/mantlet/control-plane" || first.ID != id {
		t.Errorf("Verify: %s, %v", id, err)
	}
	leaf := first.Certificates[0]
	for _, name := range []string{"mantlet.mantlet-system.svc", "10.64.0.1", "fd00::1"} {
		if err := leaf.VerifyHostname(name); err != nil {
			t.Error(err)
		}
	}
	now.t = start.Add(29 * time.Minute)
	if same, _ := s.GetX509SVID(); same != first {
		t.Error("renewed before half of the validity")
	}
	now.t = start.Add(31 * time.Minute)
	second, err := s.GetX509SVID()
	if err != nil || second == first || second.Certificates[0].PublicKey.(*ecdsa.PublicKey).Equal(leaf.PublicKey) {
		t.Errorf("not renewed with a new key at half of the validity: %v", err)
	}
	if _, err := c.NewServer(nil, []netip.Addr{{}}); err == nil {
		t.Error("an address that is not set is accepted")
	}
}
