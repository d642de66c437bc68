// Package signing serves mantlet.v1.Identity: it gives a pod the X.509-SVID of its identity.
//
//	token ──attest.Attestor──► pod ──attest.Lookup──► SPIFFE ID ─┐
//	CSR   ──parse, size limit──────────────────────► public key ─┴─ca.Sign──► certificate chain + trust bundle
//
// The pod is known before the first byte of its request is parsed.
package signing

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
)

// MaxCSR is the size limit of a certificate signing request in bytes; one with a P-256 key has about 300.
const MaxCSR = 4096

// Signer signs X.509-SVIDs; *ca.CA is one.
type Signer interface {
	Sign(csr *x509.CertificateRequest, id spiffeid.ID) ([]*x509.Certificate, error)
	Bundle() *x509bundle.Bundle
}

// Server implements mantlet.v1.Identity.
type Server struct {
	mantletv1.UnimplementedIdentityServer

	attestor attest.Attestor
	lookup   attest.Lookup
	signer   Signer
	log      *slog.Logger
	signed   func(attest.Pod, *x509.Certificate, *x509bundle.Bundle)
	await    func(context.Context, attest.Pod) error
}

// OnSigned has a function told of each certificate that a pod is given, and of the roots that come with it. It is for before Register.
func (s *Server) OnSigned(f func(attest.Pod, *x509.Certificate, *x509bundle.Bundle)) { s.signed = f }

// Await has a function asked before anything is signed for a pod, after its identity was looked up: it waits for what has to come first, and its
// error has the pod come again. It is for before Register.
func (s *Server) Await(f func(context.Context, attest.Pod) error) { s.await = f }

// New returns a Server that signs for the pods that the attestor attests, each for the identity that lookup finds.
func New(attestor attest.Attestor, lookup attest.Lookup, signer Signer, log *slog.Logger) *Server {
	return &Server{attestor: attestor, lookup: lookup, signer: signer, log: log, signed: func(attest.Pod, *x509.Certificate, *x509bundle.Bundle) {},
		await: func(context.Context, attest.Pod) error { return nil }}
}

// Register adds the service to a gRPC server, which must use TLS (see ServerTLS).
func (s *Server) Register(g grpc.ServiceRegistrar) { mantletv1.RegisterIdentityServer(g, s) }

// Sign implements mantlet.v1.Identity. The reason of a refusal is logged here; the caller gets a code and one fixed sentence.
func (s *Server) Sign(ctx context.Context, req *mantletv1.SignRequest) (*mantletv1.SignResponse, error) {
	pod, id, err := attest.Resolve(ctx, s.attestor, s.lookup)
	if err != nil {
		s.log.Warn("no identity signed", "code", status.Code(err), "reason", attest.Reason(err))
		return nil, err
	}
	log := s.log.With("pod", pod.String(), "id", id.String())
	if err := s.await(ctx, pod); err != nil {
		log.Warn("no identity signed", "code", codes.Unavailable, "reason", err)
		return nil, status.Error(codes.Unavailable, "the control plane is not ready to sign for this pod yet")
	}
	chain, err := s.sign(req.GetCsr(), id)
	switch {
	case errors.Is(err, errRequest) || errors.Is(err, ca.ErrKey):
		log.Warn("no identity signed", "code", codes.InvalidArgument, "reason", err)
		return nil, status.Errorf(codes.InvalidArgument,
			"not a PKCS#10 request of at most %d bytes, with an ECDSA P-256 key and signed with it", MaxCSR)
	case err != nil:
		log.Error("no identity signed", "code", codes.Internal, "reason", err)
		return nil, status.Error(codes.Internal, "the certificate authority cannot sign")
	}
	resp := &mantletv1.SignResponse{}
	for _, c := range chain {
		resp.CertificateChain = append(resp.CertificateChain, c.Raw)
	}
	bundle := s.signer.Bundle()
	for _, root := range bundle.X509Authorities() {
		resp.TrustBundle = append(resp.TrustBundle, root.Raw)
	}
	s.signed(pod, chain[0], bundle)
	log.Info("identity signed", "serial", chain[0].SerialNumber.Text(16), "until", chain[0].NotAfter)
	return resp, nil
}

var errRequest = errors.New("bad certificate signing request")

func (s *Server) sign(der []byte, id spiffeid.ID) ([]*x509.Certificate, error) {
	if len(der) == 0 || len(der) > MaxCSR {
		return nil, fmt.Errorf("%w: %d bytes", errRequest, len(der))
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errRequest, err)
	}
	return s.signer.Sign(csr, id)
}

// ServerTLS is the TLS configuration of the control plane's gRPC server. A client without a certificate is let in, because that
// is how an agent comes for its first one; a certificate that is shown must be an X.509-SVID of the bundle. Services other than
// Identity must insist on one: see attest.Guard. Sessions are never resumed, as Go does not verify certificates again then.
func ServerTLS(svid x509svid.Source, bundle x509bundle.Source) *tls.Config {
	verify := tlsconfig.VerifyPeerCertificate(bundle, tlsconfig.AuthorizeAny())
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		GetCertificate:         tlsconfig.GetCertificate(svid),
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequestClientCert,
		VerifyPeerCertificate: func(raw [][]byte, chains [][]*x509.Certificate) error {
			if len(raw) == 0 {
				return nil
			}
			return verify(raw, chains)
		},
	}
}
