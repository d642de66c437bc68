package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mantlet/mantlet/identity"
)

// Server is the X.509-SVID source of the control plane's own server: spiffe://<trust domain>/mantlet/control-plane, and the DNS
// names and addresses under which clients without SPIFFE find it. A new key and certificate are made once half of the validity
// is over, or when the CA signs with another key, by whoever asks first; no goroutine is needed.
type Server struct {
	ca    *CA
	extra sans

	mu    sync.Mutex
	svid  *x509svid.SVID
	by    *x509.Certificate // signed it
	renew time.Time
}

// NewServer issues the first certificate of the control plane's server.
func (c *CA) NewServer(dns []string, addrs []netip.Addr) (*Server, error) {
	for _, a := range addrs {
		if !a.IsValid() {
			return nil, fmt.Errorf("certificate of %s: an address is not set", identity.ControlPlane(c.td))
		}
	}
	s := &Server{ca: c, extra: sans{dns: dns, addrs: addrs}}
	_, err := s.GetX509SVID()
	return s, err
}

// GetX509SVID implements x509svid.Source.
func (s *Server) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.ca.now()
	by := s.ca.present().signer
	if s.svid != nil && s.by == by && now.Before(s.renew) {
		return s.svid, nil
	}
	id := identity.ControlPlane(s.ca.td)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("key of %s: %w", id, err)
	}
	chain, err := s.ca.issue(&key.PublicKey, id, s.extra)
	if err != nil {
		return nil, err
	}
	s.svid, s.by = &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, by
	s.renew = now.Add(chain[0].NotAfter.Sub(now) / 2)
	return s.svid, nil
}
