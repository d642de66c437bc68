package sds

import (
	"context"
	"crypto/ecdsa"
	"log/slog"
	"slices"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
)

// answer is a response of either variant.
type answer struct {
	version, nonce string
	names, removed []string
	secrets        map[string]*tlsv3.Secret
}

// ask is a request of either variant. In the state-of-the-world variant names are all names, in the other the new ones.
type ask struct {
	typeURL, nonce, nack string
	names, unsubscribe   []string
	have                 map[string]string
}

// wire is a client's end of a stream.
type wire interface {
	send(ask)
	next() (answer, error)
}

type worldWire struct {
	t *testing.T
	s secretv3.SecretDiscoveryService_StreamSecretsClient
}

func (w worldWire) send(a ask) {
	w.t.Helper()
	req := &discoveryv3.DiscoveryRequest{TypeUrl: a.typeURL, ResponseNonce: a.nonce, ResourceNames: a.names}
	if a.nack != "" {
		req.ErrorDetail = status.New(codes.InvalidArgument, a.nack).Proto()
	}
	if err := w.s.Send(req); err != nil {
		w.t.Fatal(err)
	}
}

func (w worldWire) next() (answer, error) {
	w.t.Helper()
	r, err := w.s.Recv()
	if err != nil {
		return answer{}, err
	}
	a := answer{version: r.GetVersionInfo(), nonce: r.GetNonce(), secrets: map[string]*tlsv3.Secret{}}
	for _, body := range r.GetResources() {
		a.add(w.t, body)
	}
	return a, nil
}

type deltaWire struct {
	t *testing.T
	s secretv3.SecretDiscoveryService_DeltaSecretsClient
}

func (w deltaWire) send(a ask) {
	w.t.Helper()
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: a.typeURL, ResponseNonce: a.nonce, ResourceNamesSubscribe: a.names,
		ResourceNamesUnsubscribe: a.unsubscribe, InitialResourceVersions: a.have}
	if a.nack != "" {
		req.ErrorDetail = status.New(codes.InvalidArgument, a.nack).Proto()
	}
	if err := w.s.Send(req); err != nil {
		w.t.Fatal(err)
	}
}

func (w deltaWire) next() (answer, error) {
	w.t.Helper()
	r, err := w.s.Recv()
	if err != nil {
		return answer{}, err
	}
	a := answer{nonce: r.GetNonce(), removed: r.GetRemovedResources(), secrets: map[string]*tlsv3.Secret{}}
	for _, res := range r.GetResources() {
		a.version += res.GetVersion()
		if name := a.add(w.t, res.GetResource()); name != res.GetName() {
			w.t.Errorf("resource %q holds secret %q", res.GetName(), name)
		}
	}
	return a, nil
}

func (a *answer) add(t *testing.T, body *anypb.Any) string {
	t.Helper()
	s := new(tlsv3.Secret)
	if err := body.UnmarshalTo(s); err != nil {
		t.Fatal(err)
	}
	a.names = append(a.names, s.GetName())
	a.secrets[s.GetName()] = s
	return s.GetName()
}

// bench is a server with a source that the test sets, and a client.
type bench struct {
	t       *testing.T
	src     *source
	server  *Server
	log     lockedBuffer
	client  secretv3.SecretDiscoveryServiceClient
	variant string
}

func (b *bench) open() wire {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second) // a missing answer fails, it does not hang
	b.t.Cleanup(cancel)
	if b.variant == "delta" {
		s, err := b.client.DeltaSecrets(ctx)
		if err != nil {
			b.t.Fatal(err)
		}
		return deltaWire{b.t, s}
	}
	s, err := b.client.StreamSecrets(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	return worldWire{b.t, s}
}

func newBench(t *testing.T, variant string) *bench {
	t.Helper()
	b := &bench{t: t, src: newSource(), variant: variant}
	var socket string
	b.server, socket = serveUnix(t, b.src, slog.New(slog.NewTextHandler(&b.log, nil)))
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	b.client = secretv3.NewSecretDiscoveryServiceClient(conn)
	return b
}

func both(t *testing.T, f func(t *testing.T, b *bench)) {
	t.Helper()
	for _, variant := range []string{"world", "delta"} {
		t.Run(variant, func(t *testing.T) { f(t, newBench(t, variant)) })
	}
}

// want takes the next answer and compares its names, and the certificate where it holds one.
func want(t *testing.T, w wire, svid *x509svid.SVID, names ...string) answer {
	t.Helper()
	a, err := w.next()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(a.names, names) {
		t.Fatalf("secrets %q, want %q", a.names, names)
	}
	if s := a.secrets["workload"]; s != nil {
		pair := s.GetTlsCertificate()
		got, err := x509svid.Parse(pair.GetCertificateChain().GetInlineBytes(), pair.GetPrivateKey().GetInlineBytes())
		if err != nil {
			t.Fatal(err)
		}
		if got.ID != svid.ID || !got.PrivateKey.(*ecdsa.PrivateKey).Equal(svid.PrivateKey) || len(got.Certificates) != len(svid.Certificates) {
			t.Errorf("the secret is not the SVID of %s with serial %x", svid.ID, svid.Certificates[0].SerialNumber)
		}
	}
	return a
}
