package ca

import (
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Whatever was signed within one step of now is trusted by whoever is one step ahead or behind; a step that is left out is refused.
func TestRotation(t *testing.T) {
	now := &clock{start}
	c, next := newCA(t, now), newCA(t, now)
	r := Rotation{Old: material(t, c), New: material(t, next)}
	server, err := c.NewServer(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, m := range map[string]Material{"new at once": r.New, "activated before it is prepared": r.Activated()} {
		if err := c.Replace(m); err == nil || !strings.Contains(err.Error(), "trusted first") {
			t.Errorf("%s: %v", name, err)
		}
	}
	sign := func() []*x509.Certificate {
		t.Helper()
		chain, err := c.Sign(request(t, &x509.CertificateRequest{}, p256(t)), web)
		if err != nil {
			t.Fatal(err)
		}
		if !c.Signed(chain[0]) {
			t.Error("the CA does not know what it has signed")
		}
		return chain
	}
	trusted := c.Bundle()
	before := sign()
	ended := before
	for i, m := range []Material{r.Prepared(), r.Activated(), r.New} {
		if i == 1 {
			if err := c.Replace(r.New); err == nil {
				t.Error("the new root alone is taken before anything is signed with it")
			}
		}
		if err := c.Replace(m); err != nil {
			t.Fatalf("step %d: %v", i+1, err)
		}
		now.t = now.t.Add(time.Minute)
		after := sign()
		own, err := server.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		for what, chain := range map[string][]*x509.Certificate{"a workload's": after, "the control plane's": own.Certificates} {
			if _, _, err := x509svid.Verify(chain, trusted, x509svid.WithTime(now.t)); err != nil {
				t.Errorf("step %d: who is one step behind refuses %s: %v", i+1, what, err)
			}
			if _, _, err := x509svid.Verify(chain, c, x509svid.WithTime(now.t)); err != nil {
				t.Errorf("step %d: %s: %v", i+1, what, err)
			}
		}
		if _, _, err := x509svid.Verify(before, c, x509svid.WithTime(now.t)); err != nil {
			t.Errorf("step %d: the certificate of the step before is refused: %v", i+1, err)
		}
		trusted, before = c.Bundle(), after
	}
	if c.Signed(ended[0]) {
		t.Error("the CA takes what the old key signed for its own")
	}
	if _, _, err := x509svid.Verify(ended, c, x509svid.WithTime(now.t)); err == nil {
		t.Error("the old root is still trusted")
	}
	if !c.Bundle().Equal(next.Bundle()) {
		t.Error("not the new root alone is left")
	}
	if err := c.Replace(Material{}); err == nil {
		t.Error("no material is taken")
	}
}
