package svid

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/attest"
)

// signed is what one renewal brings.
type signed struct {
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
}

// attempt makes a key, has it signed, and checks what came back. The connection lives for this one call: the next one is half an
// hour away, and then the token, the roots and the address may be others.
func (b *Builtin) attempt(ctx context.Context) (signed, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return signed{}, fmt.Errorf("private key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return signed{}, fmt.Errorf("certificate signing request: %w", err)
	}
	conn, err := grpc.NewClient("passthrough:///"+b.cfg.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(b.tls())),
		grpc.WithPerRPCCredentials(attest.Bearer(b.cfg.Token)),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return b.cfg.DialContext(ctx, addr) }),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(), // an HTTP proxy from the environment is the app's business, not ours
	)
	if err != nil {
		return signed{}, fmt.Errorf("address %q: %w", b.cfg.Address, err)
	}
	defer func() { _ = conn.Close() }() // nothing is lost that the call has not returned
	resp, err := mantletv1.NewIdentityClient(conn).Sign(ctx, &mantletv1.SignRequest{Csr: csr})
	if err != nil {
		return signed{}, err
	}
	return b.check(resp, key)
}

func (b *Builtin) tls() *tls.Config {
	cfg := tlsconfig.TLSClientConfig(b.forControlPlane(), tlsconfig.AuthorizeID(identity.ControlPlane(b.cfg.TrustDomain)))
	cfg.MinVersion = tls.VersionTLS13
	return cfg
}

// check accepts only what peers will accept too: a workload's X.509-SVID of our trust domain, over our key, that the new bundle
// verifies now.
func (b *Builtin) check(resp *mantletv1.SignResponse, key *ecdsa.PrivateKey) (signed, error) {
	td := b.cfg.TrustDomain
	roots, err := parse(resp.GetTrustBundle())
	if err != nil {
		return signed{}, fmt.Errorf("trust bundle from the control plane: %w", err)
	}
	for _, root := range roots {
		if !root.IsCA {
			return signed{}, fmt.Errorf("trust bundle from the control plane: %q is not a CA certificate", root.Subject)
		}
	}
	chain, err := parse(resp.GetCertificateChain())
	if err != nil {
		return signed{}, fmt.Errorf("certificate chain from the control plane: %w", err)
	}
	bundle := x509bundle.FromX509Authorities(td, roots)
	id, _, err := x509svid.Verify(chain, bundle)
	if err != nil {
		return signed{}, fmt.Errorf("certificate chain from the control plane: %w", err)
	}
	if _, err := identity.Parse(id); err != nil {
		return signed{}, fmt.Errorf("certificate from the control plane: %w", err)
	}
	if public, ok := chain[0].PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public()) {
		return signed{}, fmt.Errorf("certificate from the control plane for %s: it is for another key than ours", id)
	}
	return signed{svid: &x509svid.SVID{ID: id, Certificates: chain, PrivateKey: key}, bundle: bundle}, nil
}

func parse(ders [][]byte) ([]*x509.Certificate, error) {
	if len(ders) == 0 {
		return nil, errors.New("empty")
	}
	var certs []*x509.Certificate
	for _, der := range ders {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	return certs, nil
}
