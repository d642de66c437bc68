package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Material is what a CA consists of, in PEM, divided as Kubernetes TLS Secrets and cert-manager divide it.
type Material struct {
	Key   []byte // tls.key: the private key, PKCS#8 (SEC 1 is read as well)
	Chain []byte // tls.crt: the certificate of Key, then its issuers; a root at its end may be left out
	Roots []byte // ca.crt: every trusted root; several while roots rotate
}

// Material returns what Load takes. It holds the private key: keep it in a Secret or in memory.
func (c *CA) Material() (Material, error) {
	by := c.present()
	der, err := x509.MarshalPKCS8PrivateKey(by.key)
	if err != nil {
		return Material{}, fmt.Errorf("authority of %s: private key: %w", c.td, err)
	}
	chain := by.chain
	if len(chain) == 0 {
		chain = []*x509.Certificate{by.signer}
	}
	return Material{
		Key:   pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
		Chain: encode(chain),
		Roots: encode(by.roots),
	}, nil
}

// Load makes a CA from a root or an intermediate that was made elsewhere, or earlier. It refuses what would sign certificates
// that peers refuse: it signs one and verifies it the way they will.
func Load(cfg Config, m Material) (*CA, error) {
	c, err := configure(cfg)
	if err != nil {
		return nil, err
	}
	fail := func(what string, err error) (*CA, error) {
		return nil, fmt.Errorf("authority of %s: %s: %w", c.td, what, err)
	}
	key, err := parseKey(m.Key)
	if err != nil {
		return fail("key", err)
	}
	chain, err := parseCertificates(m.Chain)
	if err != nil {
		return fail("chain", err)
	}
	if c.roots, err = parseCertificates(m.Roots); err != nil {
		return fail("roots", err)
	}
	for _, cert := range append(append([]*x509.Certificate{}, chain...), c.roots...) {
		if err := c.checkIssuer(cert); err != nil {
			return fail(fmt.Sprintf("certificate %q", cert.Subject), err)
		}
	}
	if public, ok := chain[0].PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public()) {
		return fail("chain", errors.New("its first certificate does not belong to the key"))
	}
	c.key, c.signer, c.chain = key, chain[0], c.withoutRoots(chain)
	if err := c.prove(); err != nil {
		return fail("a certificate signed with it would be refused", err)
	}
	return c, nil
}

// checkIssuer holds signing certificates to the X509-SVID specification, sections 3 to 5.
func (c *CA) checkIssuer(cert *x509.Certificate) error {
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return errors.New("not a CA certificate (CA:true)")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("its key usage does not hold keyCertSign")
	case len(cert.URIs) > 1:
		return errors.New("more than one URI SAN")
	case len(cert.URIs) == 1 && cert.URIs[0].String() != c.td.IDString():
		return fmt.Errorf("its URI SAN is %s, not %s", cert.URIs[0], c.td.IDString())
	}
	return nil
}

// withoutRoots cuts a chain before the first certificate that the peers trust anyway.
func (c *CA) withoutRoots(chain []*x509.Certificate) []*x509.Certificate {
	for i, cert := range chain {
		for _, root := range c.roots {
			if cert.Equal(root) {
				return chain[:i]
			}
		}
	}
	return chain
}

// prove issues a leaf and verifies it against the bundle: path length, name constraints, validity and signatures in one go.
func (c *CA) prove() error { return c.provedTo(c.Bundle()) }

// proof is a leaf that nobody uses.
func (c *CA) proof() ([]*x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	id, err := spiffeid.FromSegments(c.td, "mantlet", "proof")
	if err != nil {
		return nil, err
	}
	return c.issue(&key.PublicKey, id, sans{})
}

func encode(certs []*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, cert := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	}
	return b.Bytes()
}

func parseKey(text []byte) (*ecdsa.PrivateKey, error) {
	block, rest := pem.Decode(text)
	if block == nil {
		return nil, errors.New("no PEM block")
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("something follows the PEM block; give one private key and nothing else")
	}
	switch block.Type {
	case "PRIVATE KEY":
		key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
		if err != nil {
			return nil, err
		}
		if k, ok := key.(*ecdsa.PrivateKey); ok {
			return k, nil
		}
		return nil, fmt.Errorf("%T; use an ECDSA key", key)
	case "EC PRIVATE KEY":
		return x509.ParseECPrivateKey(block.Bytes)
	}
	return nil, fmt.Errorf("a PEM block of type %q; use an ECDSA private key in PKCS#8", block.Type)
}

func parseCertificates(text []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for {
		text = bytes.TrimSpace(text)
		if len(text) == 0 {
			break
		}
		block, rest := pem.Decode(text)
		if block == nil {
			return nil, errors.New("something that is not PEM; give certificates and nothing else")
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block of type %q among the certificates", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs, text = append(certs, cert), rest
	}
	if len(certs) == 0 {
		return nil, errors.New("no certificate")
	}
	return certs, nil
}
