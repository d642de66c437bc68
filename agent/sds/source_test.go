package sds

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/identity/svid"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td = spiffeid.RequireTrustDomainFromString("mantlet.local")
	_  = svid.Source((*source)(nil))
)

// source is a svid.Source that a test sets. It hands out whatever it was given, expired or not.
type source struct {
	mu      sync.Mutex
	svid    *x509svid.SVID
	bundle  *x509bundle.Bundle
	updated chan struct{}
}

func newSource() *source { return &source{updated: make(chan struct{})} }

func (s *source) set(v *x509svid.SVID, b *x509bundle.Bundle) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.svid, s.bundle = v, b
	close(s.updated)
	s.updated = make(chan struct{})
}

func (s *source) Updated() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.updated
}

func (s *source) GetX509SVID() (*x509svid.SVID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.svid == nil {
		return nil, errors.New("no SVID yet")
	}
	return s.svid, nil
}

func (s *source) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.bundle.GetX509BundleForTrustDomain(td)
}

func newCA(t *testing.T, cfg ca.Config) *ca.CA {
	t.Helper()
	if cfg.TrustDomain.IsZero() {
		cfg.TrustDomain = td
	}
	a, err := ca.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// issue makes an X.509-SVID of a workload in the authority's trust domain.
func issue(t *testing.T, a *ca.CA, namespace string) *x509svid.SVID {
	t.Helper()
	id, err := identity.NewNamer(a.TrustDomain(), nil).ID(identity.Workload{Namespace: namespace})
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
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
	return &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}
}

// past is a clock two hours ago: what is issued by it for an hour has expired.
func past() time.Time { return time.Now().Add(-2 * time.Hour) }

// serveUnix runs an SDS server on a unix socket and ends it, open streams included, when the test ends.
func serveUnix(t *testing.T, src svid.Source, log *slog.Logger) (s *Server, socket string) {
	t.Helper()
	return serveBounded(t, src, time.Hour, log)
}

// serveBounded does so with a bound for sessions.
func serveBounded(t *testing.T, src svid.Source, bound time.Duration, log *slog.Logger) (s *Server, socket string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "sds") // t.TempDir is too long for the 108 bytes of a socket's path
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(dir, "agent.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s = New(src, bound, log)
	g := grpc.NewServer()
	s.Register(g)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		s.Close()                                                                // twice is no harm
		g.GracefulStop()                                                         // returns only because Close has ended the streams
		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // a short test ends before Serve begins
			t.Error(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return s, socket
}

// lockedBuffer is a log that a test reads while a server writes.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
