package sds

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/mantlet/mantlet/identity/svid"
	"github.com/mantlet/mantlet/xds/names"
)

// spiffeValidator is Envoy's certificate validator that picks the roots by the trust domain of the peer's SPIFFE ID.
const spiffeValidator = "envoy.tls.cert_validator.spiffe"

// secret is one resource as it goes over the wire.
type secret struct {
	name    string
	version string      // content hash
	id      spiffeid.ID // of the workload's certificate; zero for the bundle
	body    *anypb.Any
}

// offered are the names that this server has, whether or not their secrets exist yet.
func offered(name string) bool { return name == names.SecretWorkload || name == names.SecretBundle }

// material is what both secrets are made of.
type material struct {
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
}

// offer makes secrets of what the source has now, and else, of what they were made of last on this stream: Envoy keeps a certificate past its end, and
// with it the sessions, unless each period changes the bytes. Nobody who looks at that certificate takes it. Where there was none, there are none.
// The error says what is wrong with the source.
func offer(source svid.Source, last *material, epoch int64) (of *material, have map[string]secret, err error) {
	now, err := read(source)
	if err == nil {
		have, err = now.secrets(epoch)
	}
	switch {
	case err == nil:
		return now, have, nil
	case last == nil:
		return nil, nil, err
	}
	have, again := last.secrets(epoch)
	return last, have, errors.Join(err, again)
}

// read takes the material from the source as it is now. Both or none: without a valid SVID there is no trust domain to
// trust, and Envoy must not take part in anything.
func read(source svid.Source) (*material, error) {
	s, err := source.GetX509SVID()
	if err != nil {
		return nil, err
	}
	// Not every Source is ours: hold the promise here as well.
	if len(s.Certificates) == 0 {
		return nil, fmt.Errorf("X.509-SVID of %s has no certificate", s.ID)
	}
	if end := s.Certificates[0].NotAfter; !time.Now().Before(end) {
		return nil, fmt.Errorf("X.509-SVID of %s expired at %s", s.ID, end.UTC().Format(time.RFC3339))
	}
	bundle, err := source.GetX509BundleForTrustDomain(s.ID.TrustDomain())
	if err != nil {
		return nil, err
	}
	if bundle.Empty() { // Envoy would refuse it; say it in our words
		return nil, fmt.Errorf("trust bundle of %q has no root", s.ID.TrustDomain())
	}
	return &material{s, bundle}, nil
}

// secrets are those of one period.
func (m *material) secrets(epoch int64) (map[string]secret, error) {
	workload, err := workloadSecret(m.svid, epoch)
	if err != nil {
		return nil, err
	}
	trust, err := bundleSecret(m.bundle)
	if err != nil {
		return nil, err
	}
	workload.id = m.svid.ID
	return map[string]secret{workload.name: workload, trust.name: trust}, nil
}

// workloadSecret is the certificate and its key. Before them stands the epoch, outside of the PEM blocks, where it means nothing: with
// other bytes Envoy makes a new TLS context, and the keys of the old one's session tickets are gone.
func workloadSecret(s *x509svid.SVID, epoch int64) (secret, error) {
	key, err := x509.MarshalPKCS8PrivateKey(s.PrivateKey)
	if err != nil {
		return secret{}, fmt.Errorf("private key of %s: %w", s.ID, err)
	}
	return seal(&tlsv3.Secret{
		Name: names.SecretWorkload,
		Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
			CertificateChain: inline(append(fmt.Appendf(nil, "sessions %d\n", epoch), certificatesPEM(s.Certificates)...)),
			PrivateKey:       inline(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})),
		}},
	})
}

func bundleSecret(b *x509bundle.Bundle) (secret, error) {
	validator, err := anypb.New(&tlsv3.SPIFFECertValidatorConfig{
		TrustDomains: []*tlsv3.SPIFFECertValidatorConfig_TrustDomain{{
			Name:        b.TrustDomain().Name(),
			TrustBundle: inline(certificatesPEM(b.X509Authorities())),
		}},
	})
	if err != nil {
		return secret{}, fmt.Errorf("trust bundle of %q: %w", b.TrustDomain(), err)
	}
	return seal(&tlsv3.Secret{
		Name: names.SecretBundle,
		Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
			CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: spiffeValidator, TypedConfig: validator},
		}},
	})
}

func seal(s *tlsv3.Secret) (secret, error) {
	body := new(anypb.Any)
	if err := anypb.MarshalFrom(body, s, proto.MarshalOptions{Deterministic: true}); err != nil {
		return secret{}, fmt.Errorf("secret %q: %w", s.GetName(), err)
	}
	sum := sha256.Sum256(body.GetValue())
	return secret{name: s.GetName(), version: hex.EncodeToString(sum[:8]), body: body}, nil
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func certificatesPEM(certs []*x509.Certificate) []byte {
	var b []byte
	for _, c := range certs {
		b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return b
}
