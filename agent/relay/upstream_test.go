package relay

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/mantlet/mantlet/identity/ca"
)

func newCA(t *testing.T, td string) *ca.CA {
	t.Helper()
	c, err := ca.New(ca.Config{TrustDomain: spiffeid.RequireTrustDomainFromString(td)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func issue(t *testing.T, c *ca.CA, id string) *x509svid.SVID {
	t.Helper()
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
	chain, err := c.Sign(csr, spiffeid.RequireFromString(id))
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: spiffeid.RequireFromString(id), Certificates: chain, PrivateKey: key}
}

func TestUpstream(t *testing.T) {
	own, other := newCA(t, "td.example"), newCA(t, "td.example")
	controlPlane, err := own.NewServer(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	impostor, err := other.NewServer(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		server x509svid.Source
		token  func() (string, error)
		want   codes.Code
		text   string
	}{
		"control plane":     {controlPlane, func() (string, error) { return "secret\n", nil }, codes.OK, ""},
		"a workload":        {issue(t, own, "spiffe://td.example/ns/a/sa/b/labels/0123456789abcdef0123456789abcdef"), func() (string, error) { return "secret", nil }, codes.Unavailable, "unexpected ID"},
		"another authority": {impostor, func() (string, error) { return "secret", nil }, codes.Unavailable, "certificate"},
		"no token":          {controlPlane, func() (string, error) { return "", errors.New("gone") }, codes.Unauthenticated, "read the pod's token: gone"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &plane{streams: make(chan upstreamStream), end: make(chan error)}
			tlsServer := tlsconfig.MTLSServerConfig(tt.server, own, tlsconfig.AuthorizeMemberOf(own.TrustDomain()))
			tlsServer.MinVersion = tls.VersionTLS13
			s := grpc.NewServer(grpc.Creds(credentials.NewTLS(tlsServer)))
			discoveryv3.RegisterAggregatedDiscoveryServiceServer(s, p)
			l := serve(t, s)
			conn, err := Upstream{
				Address: "control-plane:15010", TrustDomain: own.TrustDomain(), SVID: issue(t, own, "spiffe://td.example/ns/a/sa/c/labels/0123456789abcdef0123456789abcdef"), Bundle: own, Token: tt.token,
				DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
					if network != "tcp" || address != "control-plane:15010" {
						t.Errorf("dials %s %s", network, address)
					}
					return l.DialContext(ctx)
				},
			}.Connect()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel() // before Close, which waits for it
			stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/"+serviceName+"/"+methodDelta)
			if tt.want != codes.OK {
				if err == nil {
					err = stream.RecvMsg(new(frame))
				}
				if status.Code(err) != tt.want || !strings.Contains(err.Error(), tt.text) {
					t.Fatalf("%v, want %s with %q", err, tt.want, tt.text)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			up := <-p.streams
			md, _ := metadata.FromIncomingContext(up.Context())
			if got := md.Get("authorization"); len(got) != 1 || got[0] != "Bearer secret" {
				t.Errorf("authorization %q", got)
			}
			p.end <- nil
			if err := stream.RecvMsg(new(frame)); err == nil {
				t.Error("no end")
			}
		})
	}
}
