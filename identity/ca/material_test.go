package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

func material(t *testing.T, c *CA) Material {
	t.Helper()
	m, err := c.Material()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestSavedAuthorityIsTheSame(t *testing.T) {
	now := &clock{start}
	a := newCA(t, now)
	now.t = start.Add(time.Hour)
	b, err := Load(Config{TrustDomain: td, Now: now.now}, material(t, a))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := b.Sign(request(t, &x509.CertificateRequest{}, p256(t)), web)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 1 {
		t.Errorf("the root is sent along: a chain of %d", len(chain))
	}
	if _, _, err := x509svid.Verify(chain, a, x509svid.WithTime(now.t)); err != nil {
		t.Error(err)
	}
	if !a.Bundle().Equal(b.Bundle()) {
		t.Error("another bundle")
	}
	if m, n := material(t, a), material(t, b); !bytes.Equal(m.Key, n.Key) || !bytes.Equal(m.Chain, n.Chain) || !bytes.Equal(m.Roots, n.Roots) {
		t.Error("saved again it differs")
	}
}

// While roots rotate both are trusted and one signs.
func TestSeveralRoots(t *testing.T) {
	now := &clock{start}
	a, b := newCA(t, now), newCA(t, now)
	m := material(t, b)
	m.Roots = append(append([]byte{}, material(t, a).Roots...), m.Roots...)
	c, err := Load(Config{TrustDomain: td, Now: now.now}, m)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(c.Bundle().X509Authorities()); n != 2 {
		t.Fatalf("%d roots", n)
	}
	old, err := a.Sign(request(t, &x509.CertificateRequest{}, p256(t)), web)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := x509svid.Verify(old, c, x509svid.WithTime(start)); err != nil {
		t.Errorf("the old root's: %v", err)
	}
	fresh, err := c.Sign(request(t, &x509.CertificateRequest{}, p256(t)), web)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := x509svid.Verify(fresh, b, x509svid.WithTime(start)); err != nil {
		t.Errorf("the new root's: %v", err)
	}
	if _, _, err := x509svid.Verify(fresh, a, x509svid.WithTime(start)); err == nil {
		t.Error("the old root alone verifies what the new one signed")
	}
}

// intermediate makes a signing certificate under an authority.
func intermediate(t *testing.T, parent *CA, edit func(*x509.Certificate)) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key := p256(t)
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(7),
		Subject:               pkix.Name{CommonName: "intermediate"},
		NotBefore:             start.Add(-time.Hour),
		NotAfter:              start.Add(24 * time.Hour),
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		KeyUsage:              x509.KeyUsageCertSign,
		URIs:                  []*url.URL{td.ID().URL()},
	}
	edit(template)
	cert, err := create(template, parent.signer, key.Public(), parent.key)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func under(t *testing.T, parent *CA, cert *x509.Certificate, key *ecdsa.PrivateKey) Material {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return Material{
		Key:   pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
		Chain: append(encode([]*x509.Certificate{cert}), material(t, parent).Chain...),
		Roots: material(t, parent).Roots,
	}
}

func TestPluggedIntermediate(t *testing.T) {
	now := &clock{start}
	root := newCA(t, now)
	cert, key := intermediate(t, root, func(*x509.Certificate) {})
	c, err := Load(Config{TrustDomain: td, Now: now.now}, under(t, root, cert, key))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := c.Sign(request(t, &x509.CertificateRequest{}, p256(t)), web)
	if err != nil {
		t.Fatal(err)
	}
	if len(chain) != 2 || !chain[1].Equal(cert) {
		t.Errorf("want leaf and intermediate without the root, got %d certificates", len(chain))
	}
	if _, _, err := x509svid.Verify(chain, root, x509svid.WithTime(start)); err != nil {
		t.Error(err)
	}
}

func TestLoadRefuses(t *testing.T) {
	now := &clock{start}
	a, b := newCA(t, now), newCA(t, now)
	ma, mb := material(t, a), material(t, b)
	foreign, _ := url.Parse("spiffe://other")
	plug := func(edit func(*x509.Certificate)) Material {
		cert, key := intermediate(t, a, edit)
		return under(t, a, cert, key)
	}
	leaf, err := a.Sign(request(t, &x509.CertificateRequest{}, p256(t)), web)
	if err != nil {
		t.Fatal(err)
	}
	deep, deepKey := intermediate(t, a, func(c *x509.Certificate) { c.MaxPathLenZero = false; c.MaxPathLen = 5 })
	sub := &CA{td: td, issuer: issuer{signer: deep, key: deepKey}}
	deeper, deeperKey := intermediate(t, sub, func(*x509.Certificate) {})
	tooDeep := under(t, a, deeper, deeperKey)
	tooDeep.Chain = append(encode([]*x509.Certificate{deeper, deep}), ma.Chain...)

	other := spiffeid.RequireTrustDomainFromString("other")
	for _, tc := range []struct {
		name string
		td   spiffeid.TrustDomain
		m    Material
		text string
	}{
		{"nothing", td, Material{}, "no PEM block"},
		{"no roots", td, Material{Key: ma.Key, Chain: ma.Chain}, "roots: no certificate"},
		{"another's key", td, Material{Key: mb.Key, Chain: ma.Chain, Roots: ma.Roots}, "does not belong to the key"},
		{"signer not under the roots", td, Material{Key: ma.Key, Chain: ma.Chain, Roots: mb.Roots}, "would be refused"},
		{"key among the roots", td, Material{Key: ma.Key, Chain: ma.Chain, Roots: append(ma.Roots[:len(ma.Roots):len(ma.Roots)], ma.Key...)}, "PRIVATE KEY"},
		{"rubbish after the roots", td, Material{Key: ma.Key, Chain: ma.Chain, Roots: append(ma.Roots[:len(ma.Roots):len(ma.Roots)], "x"...)}, "not PEM"},
		{"two keys", td, Material{Key: append(ma.Key[:len(ma.Key):len(ma.Key)], mb.Key...), Chain: ma.Chain, Roots: ma.Roots}, "follows the PEM block"},
		{"other trust domain", other, ma, "its URI SAN is spiffe://mantlet.local"},
		{"a leaf as root", td, Material{Key: ma.Key, Chain: ma.Chain, Roots: encode(leaf)}, "not a CA certificate"},
		{"intermediate without keyCertSign", td, plug(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }), "keyCertSign"},
		{"intermediate of another trust domain", td, plug(func(c *x509.Certificate) { c.URIs = []*url.URL{foreign} }), "its URI SAN is spiffe://other"},
		{"intermediate with two URIs", td, plug(func(c *x509.Certificate) { c.URIs = append(c.URIs, foreign) }), "more than one URI"},
		{"expired intermediate", td, plug(func(c *x509.Certificate) { c.NotAfter = start.Add(-time.Second) }), "is valid from"},
		{"deeper than the root allows", td, tooDeep, "would be refused"},
	} {
		c, err := Load(Config{TrustDomain: tc.td, Now: now.now}, tc.m)
		if err == nil || c != nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v; want an error with %q", tc.name, err, tc.text)
		}
	}
}
