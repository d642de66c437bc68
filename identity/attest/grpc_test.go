package attest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/ca"
)

var (
	td    = spiffeid.RequireTrustDomainFromString("mantlet.local")
	namer = identity.NewNamer(td, nil)
)

func call(values ...string) context.Context {
	return metadata.NewIncomingContext(context.Background(), metadata.MD{"authorization": values})
}

// attestorFunc is an Attestor whose answer a test chooses.
type attestorFunc func(string) (Pod, error)

func (f attestorFunc) Attest(_ context.Context, token string) (Pod, error) { return f(token) }

func TestFromContext(t *testing.T) {
	answer := func(p Pod, err error) Attestor { return attestorFunc(func(string) (Pod, error) { return p, err }) }
	secret := errors.New("secret reason")
	for _, tc := range []struct {
		name string
		ctx  context.Context
		a    Attestor
		want codes.Code
	}{
		{"good", call("Bearer x"), answer(web0, nil), codes.OK},
		{"scheme in lower case", call("bearer x"), answer(web0, nil), codes.OK},
		{"no metadata", context.Background(), answer(web0, nil), codes.Unauthenticated},
		{"no authorization", call(), answer(web0, nil), codes.Unauthenticated},
		{"two", call("Bearer x", "Bearer y"), answer(web0, nil), codes.Unauthenticated},
		{"basic", call("Basic x"), answer(web0, nil), codes.Unauthenticated},
		{"empty token", call("Bearer "), answer(web0, nil), codes.Unauthenticated},
		{"no token", call("Bearer"), answer(web0, nil), codes.Unauthenticated},
		{"huge", call("Bearer " + strings.Repeat("x", maxToken+1)), answer(web0, nil), codes.Unauthenticated},
		{"refused", call("Bearer x"), answer(Pod{}, fmt.Errorf("%w: %w", ErrRefused, secret)), codes.Unauthenticated},
		{"incomplete pod", call("Bearer x"), answer(Pod{Namespace: "shop", Name: "web-0"}, nil), codes.Unauthenticated},
		{"attestor down", call("Bearer x"), answer(Pod{}, secret), codes.Unavailable},
	} {
		pod, err := FromContext(tc.ctx, tc.a)
		if got := status.Code(err); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.name, got, tc.want)
		}
		if (err == nil) != (pod == web0) || err != nil && pod != (Pod{}) {
			t.Errorf("%s: pod %v with error %v", tc.name, pod, err)
		}
		if err != nil && strings.Contains(status.Convert(fmt.Errorf("wrapped: %w", err)).Message(), "secret reason") {
			t.Errorf("%s: the caller learns the reason: %v", tc.name, err)
		}
		if tc.name == "refused" && !errors.Is(Reason(err), secret) {
			t.Errorf("%s: the log does not learn the reason: %v", tc.name, Reason(err))
		}
	}
}

func TestResolve(t *testing.T) {
	a := attestorFunc(func(string) (Pod, error) { return web0, nil })
	id, err := namer.ID(identity.Workload{Namespace: "shop"})
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		id   spiffeid.ID
		err  error
		want codes.Code
	}{
		{"found", id, nil, codes.OK},
		{"unknown", spiffeid.ID{}, fmt.Errorf("%w: deleted", ErrUnknownPod), codes.NotFound},
		{"not ours", spiffeid.ID{}, errors.New("host network"), codes.PermissionDenied},
		{"zero", spiffeid.ID{}, nil, codes.PermissionDenied},
	} {
		pod, got, err := Resolve(call("Bearer x"), a, func(p Pod) (spiffeid.ID, error) {
			if p != web0 {
				t.Errorf("lookup of %v", p)
			}
			return tc.id, tc.err
		})
		if status.Code(err) != tc.want || (err == nil) != (pod == web0 && got == id) {
			t.Errorf("%s: %v, %v, %v; want %s", tc.name, pod, got, err, tc.want)
		}
	}
}

func TestBearer(t *testing.T) {
	next := "one\n" // files end in a newline
	creds := Bearer(func() (string, error) { return next, nil })
	if !creds.RequireTransportSecurity() {
		t.Error("tokens go over plaintext")
	}
	for _, want := range []string{"Bearer one", "Bearer two"} {
		md, err := creds.GetRequestMetadata(context.Background())
		if err != nil || md["authorization"] != want {
			t.Errorf("%v, %v; want %s", md, err, want)
		}
		next = "two"
	}
	next = " "
	if _, err := creds.GetRequestMetadata(context.Background()); err == nil {
		t.Error("an empty token is sent")
	}
	if _, err := Bearer(func() (string, error) { return "x", errors.New("no file") }).GetRequestMetadata(context.Background()); err == nil {
		t.Error("a token that could not be read is sent")
	}
}

// A stream needs the SVID and the token, and both must speak of the same workload.
func TestGuard(t *testing.T) {
	now := &clock{start}
	authority, other := newCA(t, now), newCA(t, now)
	shop, err := namer.ID(identity.Workload{Namespace: "shop"})
	if err != nil {
		t.Fatal(err)
	}
	lab, err := namer.ID(identity.Workload{Namespace: "lab"})
	if err != nil {
		t.Fatal(err)
	}
	m := NewMinter(MinterConfig{Now: now.now, TTL: 24 * time.Hour})
	token := mint(t, m, web0, Audience)
	g := &Guard{Attestor: m, Bundle: authority, Now: now.now, Lookup: func(p Pod) (spiffeid.ID, error) {
		if p == web0 {
			return shop, nil
		}
		return spiffeid.ID{}, ErrUnknownPod
	}}
	over := func(ctx context.Context, chain []*x509.Certificate) context.Context {
		return peer.NewContext(ctx, &peer.Peer{AuthInfo: credentials.TLSInfo{State: tls.ConnectionState{PeerCertificates: chain}}})
	}
	for _, tc := range []struct {
		name string
		ctx  context.Context
		age  time.Duration
		want codes.Code
	}{
		{"both", over(call("Bearer "+token), svid(t, authority, shop)), 0, codes.OK},
		{"no TLS", call("Bearer " + token), 0, codes.Unauthenticated},
		{"no certificate", over(call("Bearer "+token), nil), 0, codes.Unauthenticated},
		{"another CA", over(call("Bearer "+token), svid(t, other, shop)), 0, codes.Unauthenticated},
		{"no token", over(context.Background(), svid(t, authority, shop)), 0, codes.Unauthenticated},
		{"bad token", over(call("Bearer x.y"), svid(t, authority, shop)), 0, codes.Unauthenticated},
		{"another workload's", over(call("Bearer "+token), svid(t, authority, lab)), 0, codes.PermissionDenied},
		{"unknown pod", over(call("Bearer "+mint(t, m, web1, Audience)), svid(t, authority, shop)), 0, codes.NotFound},
		{"before it expires", over(call("Bearer "+mint(t, m, web0, Audience)), svid(t, authority, shop)), 59 * time.Minute, codes.OK},
		{"expired on an open connection", over(call("Bearer "+mint(t, m, web0, Audience)), svid(t, authority, shop)), time.Hour + time.Second, codes.Unauthenticated},
	} {
		now.t = start.Add(tc.age)
		var differs []Pod
		g.Differs = func(p Pod, leaf *x509.Certificate) {
			if differs = append(differs, p); leaf.URIs[0].String() != lab.String() {
				t.Errorf("%s: told of %s", tc.name, leaf.URIs)
			}
		}
		pod, id, err := g.Peer(tc.ctx)
		if told := len(differs) == 1 && differs[0] == web0; told != (tc.want == codes.PermissionDenied) || len(differs) > 1 {
			t.Errorf("%s: told of %v", tc.name, differs)
		}
		if status.Code(err) != tc.want || (err == nil) != (pod == web0 && id == shop) {
			t.Errorf("%s: %v, %v, %v; want %s", tc.name, pod, id, err, tc.want)
		}
		now.t = start
	}
}

func newCA(t *testing.T, c *clock) *ca.CA {
	t.Helper()
	a, err := ca.New(ca.Config{TrustDomain: td, Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func svid(t *testing.T, a *ca.CA, id spiffeid.ID) []*x509.Certificate {
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
	chain, err := a.Sign(csr, id)
	if err != nil {
		t.Fatal(err)
	}
	return chain
}
