// Package ca is Mantlet's own certificate authority: it turns a public key and a SPIFFE ID into an X.509-SVID.
//
//	root (10 years, ECDSA P-256) ──signs──► X.509-SVID of a workload (1 hour)
//	  │                            └──────► X.509-SVID of the control plane's server, with DNS names and addresses
//	  └── trust bundle, with any further roots
//
// Roots are replaced while all of it runs: see [Rotation].
//
// The root is made here ([New]) or comes from outside ([Load]), where an intermediate may stand in for it. What is signed follows
// the X509-SVID specification of SPIFFE: exactly one URI SAN, CA:false, digitalSignature, and no subject.
//
// The CA decides nothing about who may have which identity; see the packages attest and signing.
package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/identity"
)

const (
	// DefaultTTL is how long an X.509-SVID is valid unless the configuration says otherwise.
	DefaultTTL = time.Hour
	// RootTTL is how long a root made by New is valid.
	RootTTL = 10 * 365 * 24 * time.Hour
	// Skew is how far certificates are backdated, for clocks that are behind ours.
	Skew = time.Minute
	// rootPathLen leaves room for one intermediate between the root and the leaves.
	rootPathLen = 1
)

// ErrKey is wrapped by the errors of Sign for a request whose key or signature is not acceptable: the requester's fault.
var ErrKey = errors.New("unacceptable key")

// Config is what a CA is made from.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	TTL         time.Duration    // validity of X.509-SVIDs; zero: DefaultTTL
	Now         func() time.Time // nil: time.Now
}

// CA signs X.509-SVIDs of one trust domain. It is safe for concurrent use.
type CA struct {
	td  spiffeid.TrustDomain
	ttl time.Duration
	now func() time.Time

	mu sync.RWMutex
	issuer
}

// issuer is what a CA signs with, and what it has trusted.
type issuer struct {
	key    crypto.Signer
	signer *x509.Certificate   // belongs to key
	chain  []*x509.Certificate // follows a leaf: signer and its issuers up to but without a root; empty where a root signs
	roots  []*x509.Certificate
}

// New makes a CA with a new root.
func New(cfg Config) (*CA, error) {
	c, err := configure(cfg)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("root key of %s: %w", c.td, err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := c.now()
	root, err := create(&x509.Certificate{
		SerialNumber: serial,
		// The serial number in the name keeps the roots of a rotation apart where software searches by name.
		Subject:               pkix.Name{Organization: []string{"Mantlet"}, CommonName: "Mantlet root", SerialNumber: serial.Text(16)},
		NotBefore:             now.Add(-Skew),
		NotAfter:              now.Add(RootTTL),
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLen:            rootPathLen,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{c.td.ID().URL()},
	}, nil, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("root of %s: %w", c.td, err)
	}
	c.key, c.signer, c.roots = key, root, []*x509.Certificate{root}
	return c, nil
}

func configure(cfg Config) (*CA, error) {
	c := &CA{td: cfg.TrustDomain, ttl: cfg.TTL, now: cfg.Now}
	if c.td.IsZero() {
		return nil, errors.New("certificate authority: no trust domain; set Config.TrustDomain")
	}
	if c.ttl == 0 {
		c.ttl = DefaultTTL
	}
	// Below this, backdating and renewal at half-life leave nothing to work with.
	if c.ttl < 10*time.Second {
		return nil, fmt.Errorf("certificate authority of %s: a validity of %s for X.509-SVIDs is too short; use at least 10s", c.td, c.ttl)
	}
	if c.now == nil {
		c.now = time.Now
	}
	return c, nil
}

// TTL is how long an X.509-SVID is valid at most.
func (c *CA) TTL() time.Duration { return c.ttl }

// TrustDomain returns the trust domain whose identities the CA signs.
func (c *CA) TrustDomain() spiffeid.TrustDomain { return c.td }

// present is the issuer at this moment.
func (c *CA) present() issuer {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.issuer
}

// Bundle returns the trust bundle: all roots, as a value of its own.
func (c *CA) Bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(c.td, c.present().roots)
}

// GetX509BundleForTrustDomain makes the CA an x509bundle.Source of its own trust domain.
func (c *CA) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != c.td {
		return nil, fmt.Errorf("no trust bundle for trust domain %q: this authority serves %q", td, c.td)
	}
	return c.Bundle(), nil
}

// Sign signs the public key of a certificate signing request for a workload: the X.509-SVID, the leaf first, then intermediates,
// no root. Of the request it takes the public key and nothing else. The error wraps ErrKey where the request is at fault.
func (c *CA) Sign(csr *x509.CertificateRequest, id spiffeid.ID) ([]*x509.Certificate, error) {
	// Workload identities only: whoever finds the identity of a pod must never be able to name the control plane by mistake.
	if _, err := identity.Parse(id); err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("sign for %s: %w: the request is not signed with its own key: %w", id, ErrKey, err)
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("sign for %s: %w: %s; use ECDSA P-256", id, ErrKey, describe(csr.PublicKey))
	}
	return c.issue(key, id, sans{})
}

// sans are the names of a leaf beside its SPIFFE ID.
type sans struct {
	dns   []string
	addrs []netip.Addr
}

func (c *CA) issue(key *ecdsa.PublicKey, id spiffeid.ID, extra sans) ([]*x509.Certificate, error) {
	if !id.MemberOf(c.td) {
		return nil, fmt.Errorf("sign for %s: not in trust domain %q", id, c.td)
	}
	now, by := c.now(), c.present()
	if now.Before(by.signer.NotBefore) || now.After(by.signer.NotAfter) {
		return nil, fmt.Errorf("sign for %s: the authority's certificate is valid from %s to %s only; replace it", id,
			by.signer.NotBefore.UTC().Format(time.RFC3339), by.signer.NotAfter.UTC().Format(time.RFC3339))
	}
	end := now.Add(c.ttl)
	for _, issuer := range append([]*x509.Certificate{by.signer}, by.chain...) {
		if issuer.NotAfter.Before(end) {
			end = issuer.NotAfter // a leaf that seems to outlive its issuer would be renewed too late
		}
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	leaf := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             now.Add(-Skew),
		NotAfter:              end,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:                  []*url.URL{id.URL()},
		DNSNames:              extra.dns,
	}
	for _, a := range extra.addrs {
		leaf.IPAddresses = append(leaf.IPAddresses, net.IP(a.Unmap().AsSlice()))
	}
	cert, err := create(leaf, by.signer, key, by.key)
	if err != nil {
		return nil, fmt.Errorf("sign for %s: %w", id, err)
	}
	return append([]*x509.Certificate{cert}, by.chain...), nil
}

// create signs a template; without a parent it is self-signed.
func create(template, parent *x509.Certificate, public crypto.PublicKey, signer crypto.Signer) (*x509.Certificate, error) {
	if parent == nil {
		parent = template
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// newSerial returns 128 random bits, never zero (RFC 5280, section 4.1.2.2 wants a positive number of at most 20 octets).
func newSerial() (*big.Int, error) {
	for {
		n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
		if err != nil {
			return nil, fmt.Errorf("serial number: %w", err)
		}
		if n.Sign() > 0 {
			return n, nil
		}
	}
}

func describe(key any) string {
	if k, ok := key.(*ecdsa.PublicKey); ok {
		return "ECDSA " + k.Curve.Params().Name
	}
	return fmt.Sprintf("%T", key)
}
