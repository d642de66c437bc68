package svid

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/identity/ca"
)

// What the control plane answers is held against what peers will hold it against.
func TestAnswerRefused(t *testing.T) {
	p := newPlane(t)
	b, err := NewBuiltin(p.config())
	if err != nil {
		t.Fatal(err)
	}
	foreign := spiffeid.RequireTrustDomainFromString("other")
	otherCA, err := ca.New(ca.Config{TrustDomain: foreign})
	if err != nil {
		t.Fatal(err)
	}
	past, err := ca.New(ca.Config{TrustDomain: td, Now: func() time.Time { return time.Now().Add(-2 * time.Hour) }})
	if err != nil {
		t.Fatal(err)
	}
	server, err := p.ca.NewServer(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	plane, err := server.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := shopID(pod)
	key, another := newKey(t), newKey(t)
	good := leaf(t, p.ca, id, key)
	roots := ders(p.ca.Bundle().X509Authorities())
	if _, err := b.check(&mantletv1.SignResponse{CertificateChain: good, TrustBundle: roots}, key); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name         string
		chain, roots [][]byte
		key          *ecdsa.PrivateKey
		text         string
	}{
		{"no roots", good, nil, key, "trust bundle from the control plane: empty"},
		{"rubbish as root", good, [][]byte{{1}}, key, "trust bundle"},
		{"a leaf as root", good, good, key, "not a CA certificate"},
		{"no chain", nil, roots, key, "chain from the control plane: empty"},
		{"rubbish in the chain", [][]byte{good[0], {1}}, roots, key, "chain"},
		{"roots of another CA", good, ders(newCA(t).Bundle().X509Authorities()), key, "could not verify"},
		{"expired", leaf(t, past, id, key), ders(past.Bundle().X509Authorities()), key, "expired"},
		{"for another key", good, roots, another, "another key"},
		{"the control plane's own", ders(plane.Certificates), roots, plane.PrivateKey.(*ecdsa.PrivateKey), "not of the form"},
		{"another trust domain", leaf(t, otherCA, spiffeid.RequireFromPath(foreign, id.Path()), key),
			ders(otherCA.Bundle().X509Authorities()), key, "bundle"},
	} {
		got, err := b.check(&mantletv1.SignResponse{CertificateChain: tc.chain, TrustBundle: tc.roots}, tc.key)
		if err == nil || got.svid != nil || got.bundle != nil || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("%s: %v; want an error with %q", tc.name, err, tc.text)
		}
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func leaf(t *testing.T, a *ca.CA, id spiffeid.ID, key *ecdsa.PrivateKey) [][]byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.Sign(csr, id)
	if err != nil {
		t.Fatal(err)
	}
	return ders(chain)
}

func ders(certs []*x509.Certificate) [][]byte {
	var out [][]byte
	for _, c := range certs {
		out = append(out, c.Raw)
	}
	return out
}
