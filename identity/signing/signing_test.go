package signing

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td  = spiffeid.RequireTrustDomainFromString("mantlet.local")
	web = attest.Pod{Namespace: "shop", Name: "web-0", UID: "u1"}
)

// plane is a control plane's gRPC server on loopback, with one pod that it knows.
type plane struct {
	t      *testing.T
	ca     *ca.CA
	minter *attest.Minter
	addr   string
	log    *lockedBuffer
}

func start(t *testing.T, lookup attest.Lookup) *plane {
	t.Helper()
	authority, err := ca.New(ca.Config{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	server, err := authority.NewServer(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := &plane{t: t, ca: authority, minter: attest.NewMinter(attest.MinterConfig{}), log: &lockedBuffer{}}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(ServerTLS(server, authority))))
	New(p.minter, lookup, authority, slog.New(slog.NewTextHandler(p.log, nil))).Register(g)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.addr = l.Addr().String()
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		g.Stop()
		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // a short test ends before Serve begins
			t.Error(err)
		}
	})
	return p
}

func (p *plane) token(pod attest.Pod, audience string) string {
	p.t.Helper()
	token, _, err := p.minter.Mint(pod, audience)
	if err != nil {
		p.t.Fatal(err)
	}
	return token
}

func (p *plane) sign(token string, csr []byte) (*mantletv1.SignResponse, error) {
	p.t.Helper()
	conn, err := grpc.NewClient(p.addr,
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.TLSClientConfig(p.ca, tlsconfig.AuthorizeID(identity.ControlPlane(td))))),
		grpc.WithPerRPCCredentials(attest.Bearer(func() (string, error) { return token, nil })))
	if err != nil {
		p.t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	return mantletv1.NewIdentityClient(conn).Sign(context.Background(), &mantletv1.SignRequest{Csr: csr})
}

func shopID(p attest.Pod) (spiffeid.ID, error) {
	if p != web {
		return spiffeid.ID{}, attest.ErrUnknownPod
	}
	return identity.NewNamer(td, nil).ID(identity.Workload{Namespace: "shop", ServiceAccount: "web"})
}

func newKey(t *testing.T, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(t *testing.T, curve elliptic.Curve) ([]byte, *ecdsa.PrivateKey) {
	t.Helper()
	key := newKey(t, curve)
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der, key
}

func TestSign(t *testing.T) {
	p := start(t, shopID)
	csr, key := request(t, elliptic.P256())
	resp, err := p.sign(p.token(web, attest.Audience), csr)
	if err != nil {
		t.Fatal(err)
	}
	id, _, err := x509svid.ParseAndVerify(resp.GetCertificateChain(), p.ca)
	want, _ := shopID(web)
	if err != nil || id != want {
		t.Errorf("%s, %v; want %s", id, err, want)
	}
	leaf, err := x509.ParseCertificate(resp.GetCertificateChain()[0])
	if err != nil || !key.PublicKey.Equal(leaf.PublicKey) {
		t.Errorf("not our key: %v", err)
	}
	if b := resp.GetTrustBundle(); len(b) != 1 || !bytes.Equal(b[0], p.ca.Bundle().X509Authorities()[0].Raw) {
		t.Errorf("%d roots", len(b))
	}
}

func TestSignRefuses(t *testing.T) {
	noIdentity := attest.Pod{Namespace: "shop", Name: "host", UID: "u9"}
	p := start(t, func(pod attest.Pod) (spiffeid.ID, error) {
		if pod == noIdentity {
			return spiffeid.ID{}, errors.New("secret reason")
		}
		return shopID(pod)
	})
	good, _ := request(t, elliptic.P256())
	p384, _ := request(t, elliptic.P384())
	long, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{strings.Repeat("x", MaxCSR)}}, newKey(t, elliptic.P256()))
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(good)
	bad[len(bad)-1] ^= 1
	revoked := p.token(attest.Pod{Namespace: "shop", Name: "old", UID: "u3"}, attest.Audience)
	p.minter.Revoke("u3")
	reborn := attest.Pod{Namespace: web.Namespace, Name: web.Name, UID: "u2"}
	for _, tc := range []struct {
		name, token string
		csr         []byte
		want        codes.Code
	}{
		{"unknown token", "a.b", good, codes.Unauthenticated},
		{"other audience", p.token(web, "vault"), good, codes.Unauthenticated},
		{"revoked", revoked, good, codes.Unauthenticated},
		{"unknown pod", p.token(attest.Pod{Namespace: "shop", Name: "new", UID: "u4"}, attest.Audience), good, codes.NotFound},
		{"same name, another pod", p.token(reborn, attest.Audience), good, codes.NotFound},
		{"no identity", p.token(noIdentity, attest.Audience), good, codes.PermissionDenied},
		{"no request", p.token(web, attest.Audience), nil, codes.InvalidArgument},
		{"rubbish", p.token(web, attest.Audience), []byte("rubbish"), codes.InvalidArgument},
		{"something after it", p.token(web, attest.Audience), append(bytes.Clone(good), 0), codes.InvalidArgument},
		{"too long, else good", p.token(web, attest.Audience), long, codes.InvalidArgument},
		{"P-384", p.token(web, attest.Audience), p384, codes.InvalidArgument},
		{"bad signature", p.token(web, attest.Audience), bad, codes.InvalidArgument},
		// Who is not attested learns nothing about requests either.
		{"rubbish without a token", "x", []byte("rubbish"), codes.Unauthenticated},
	} {
		resp, err := p.sign(tc.token, tc.csr)
		if status.Code(err) != tc.want || resp != nil {
			t.Errorf("%s: %v, %v; want %s", tc.name, resp, err, tc.want)
		}
		for _, secret := range []string{"secret reason", "audience", "revoked", "vault", "mantlet.local", tc.token} {
			if len(secret) > 1 && strings.Contains(status.Convert(err).Message(), secret) {
				t.Errorf("%s: the caller is told %q", tc.name, status.Convert(err).Message())
			}
		}
	}
	for _, want := range []string{"secret reason", "vault", "unknown or revoked", "P-384"} {
		if !strings.Contains(p.log.String(), want) {
			t.Errorf("the log does not say %q", want)
		}
	}
	if strings.Contains(p.log.String(), revoked) {
		t.Error("the log holds a token")
	}
}

// failing is a CA that cannot sign.
type failing struct{ *ca.CA }

func (failing) Sign(*x509.CertificateRequest, spiffeid.ID) ([]*x509.Certificate, error) {
	return nil, errors.New("secret reason")
}

func TestAuthorityFails(t *testing.T) {
	p := start(t, shopID)
	var log lockedBuffer
	s := New(p.minter, shopID, failing{p.ca}, slog.New(slog.NewTextHandler(&log, nil)))
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", "Bearer "+p.token(web, attest.Audience)))
	csr, _ := request(t, elliptic.P256())
	_, err := s.Sign(ctx, &mantletv1.SignRequest{Csr: csr})
	if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") || !strings.Contains(log.String(), "secret reason") {
		t.Errorf("%v; log: %s", err, log.String())
	}
}

// Nothing is signed before what has to come first, and the pod may come again.
func TestAwait(t *testing.T) {
	p := start(t, shopID)
	var log lockedBuffer
	var first error
	s := New(p.minter, shopID, p.ca, slog.New(slog.NewTextHandler(&log, nil)))
	s.Await(func(_ context.Context, pod attest.Pod) error {
		if pod != web {
			t.Errorf("asked about %v", pod)
		}
		return first
	})
	s.OnSigned(func(attest.Pod, *x509.Certificate, *x509bundle.Bundle) {
		if first != nil {
			t.Error("signed")
		}
	})
	ctx := metadata.NewIncomingContext(context.Background(), metadata.Pairs("authorization", "Bearer "+p.token(web, attest.Audience)))
	csr, _ := request(t, elliptic.P256())
	for _, first = range []error{errors.New("secret reason"), nil} {
		resp, err := s.Sign(ctx, &mantletv1.SignRequest{Csr: csr})
		if first == nil {
			if err != nil || len(resp.CertificateChain) == 0 {
				t.Errorf("%v", err)
			}
			continue
		}
		if status.Code(err) != codes.Unavailable || strings.Contains(err.Error(), "secret") || !strings.Contains(log.String(), "secret reason") {
			t.Errorf("%v; log: %s", err, log.String())
		}
	}
}

// A server without TLS gets no token.
func TestTokenStaysOffPlaintext(t *testing.T) {
	_, err := grpc.NewClient("127.0.0.1:1", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithPerRPCCredentials(attest.Bearer(func() (string, error) { return "x", nil })))
	if err == nil {
		t.Error("a client over plaintext is willing to send the token")
	}
}

func TestServerTLS(t *testing.T) {
	p := start(t, shopID)
	other, err := ca.New(ca.Config{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	pair := func(a *ca.CA) []tls.Certificate {
		csr, key := request(t, elliptic.P256())
		parsed, _ := x509.ParseCertificateRequest(csr)
		id, _ := shopID(web)
		chain, err := a.Sign(parsed, id)
		if err != nil {
			t.Fatal(err)
		}
		return []tls.Certificate{{Certificate: [][]byte{chain[0].Raw}, PrivateKey: key}}
	}
	for _, tc := range []struct {
		name  string
		certs []tls.Certificate
		max   uint16
		ok    bool
	}{
		{"no certificate", nil, 0, true},
		{"ours", pair(p.ca), 0, true},
		{"another CA's", pair(other), 0, false},
		{"TLS 1.2", nil, tls.VersionTLS12, false},
	} {
		cfg := tlsconfig.TLSClientConfig(p.ca, tlsconfig.AuthorizeID(identity.ControlPlane(td)))
		cfg.Certificates, cfg.NextProtos, cfg.MaxVersion = tc.certs, []string{"h2"}, tc.max
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(1)
		for range 2 { // the second time would be a resumption
			conn, err := tls.Dial("tcp", p.addr, cfg)
			if err == nil {
				// In TLS 1.3 the client is done before its certificate is judged: the first byte tells.
				_, err = conn.Read(make([]byte, 1))
				if conn.ConnectionState().DidResume {
					t.Errorf("%s: the session is resumed", tc.name)
				}
				_ = conn.Close()
			}
			if (err == nil) != tc.ok {
				t.Errorf("%s: %v", tc.name, err)
			}
		}
	}
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
