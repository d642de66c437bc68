package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Rotation leads from one root, or signing certificate, to another without a moment at which somebody refuses what somebody else shows:
//
//	           signs   trusted    until every workload and the control plane's clients have
//	Old        old     old
//	Prepared   old     old, new   the bundle with both
//	Activated  new     old, new   a certificate of the new one
//	New        new     new        (what the old one signed is refused from here on)
//
// Each step is a Material like any other: it goes into the Secret that the control plane's replicas read, and into force by [CA.Replace],
// which refuses a step left out. When the next one may be taken is for who knows the workloads to say.
type Rotation struct {
	Old, New Material
}

// Prepared trusts the new root too.
func (r Rotation) Prepared() Material {
	return Material{Key: r.Old.Key, Chain: r.Old.Chain, Roots: r.both()}
}

// Activated signs with the new key.
func (r Rotation) Activated() Material {
	return Material{Key: r.New.Key, Chain: r.New.Chain, Roots: r.both()}
}

func (r Rotation) both() []byte {
	roots := bytes.TrimSpace(r.Old.Roots)
	return append(append(bytes.Clone(roots), '\n'), r.New.Roots...)
}

// ErrParts is wrapped by Replace's error where the material is usable, and would part workloads.
var ErrParts = errors.New("it would part workloads")

// Replace puts other material in force: what is signed and trusted from now on. It refuses what would part the workloads that have heard
// of it from those that have not yet ([ErrParts]): what either of the two signs must be trusted by the other.
func (c *CA) Replace(m Material) error {
	next, err := Load(Config{TrustDomain: c.td, TTL: c.ttl, Now: c.now}, m)
	if err != nil {
		return err
	}
	if err := next.provedTo(c.Bundle()); err != nil {
		return fmt.Errorf("authority of %s: %w: they would refuse what the new key signs; have its root trusted first: %w", c.td, ErrParts, err)
	}
	if err := c.provedTo(next.Bundle()); err != nil {
		return fmt.Errorf("authority of %s: %w: what was signed until now would be refused at once; sign with the new key first, and have all certificates renewed: %w", c.td, ErrParts, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.issuer = next.issuer
	return nil
}

// Fingerprint tells one signing certificate with its trusted roots from others, in 32 hexadecimal digits: replicas of one fingerprint sign and trust the same.
func (c *CA) Fingerprint() string {
	by := c.present()
	var roots [][]byte
	for _, root := range by.roots {
		roots = append(roots, root.Raw)
	}
	slices.SortFunc(roots, bytes.Compare)
	sum := sha256.New()
	for _, der := range append([][]byte{by.signer.Raw}, slices.CompactFunc(roots, bytes.Equal)...) {
		one := sha256.Sum256(der)
		sum.Write(one[:])
	}
	return hex.EncodeToString(sum.Sum(nil)[:16])
}

// Signed reports whether the key in force signed a leaf.
func (c *CA) Signed(leaf *x509.Certificate) bool {
	return leaf.CheckSignatureFrom(c.present().signer) == nil
}

// provedTo issues a leaf and verifies it against a bundle.
func (c *CA) provedTo(bundle *x509bundle.Bundle) error {
	chain, err := c.proof()
	if err != nil {
		return err
	}
	_, _, err = x509svid.Verify(chain, bundle, x509svid.WithTime(c.now()))
	return err
}
