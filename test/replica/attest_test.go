package replica

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/util/keyutil"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/test/cluster"
	xdsnames "github.com/mantlet/mantlet/xds/names"
)

// bundle is what sidecars of the namespace trust.
func (w *world) bundle() (text string) {
	w.t.Helper()
	if !until(w.t.Context(), func() bool {
		m, err := w.client.CoreV1().ConfigMaps("shop").Get(w.t.Context(), names.RootConfigMap, metav1.GetOptions{})
		if err == nil {
			text = m.Data[names.RootKey]
		}
		return text != ""
	}) {
		w.t.Fatal("the namespace has no trust bundle")
	}
	return text
}

// token is one that the API server gives, bound to a pod; nil: to none.
func (w *world) token(p *sidecarPod, audience string) string {
	w.t.Helper()
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}
	if p != nil {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: p.object.Name, UID: p.object.UID}
	}
	r, err := w.client.CoreV1().ServiceAccounts("shop").CreateToken(w.t.Context(), "default", request, metav1.CreateOptions{})
	w.must(err)
	return r.Status.Token
}

// aged is a token as the API server would have given it some time before: with that time taken off all its times, and signed with the API server's own key. (It
// gives none for less than ten minutes, TokenRequestSpec.expirationSeconds.)
func (w *world) aged(token string, by time.Duration) string {
	w.t.Helper()
	given, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES256})
	w.must(err)
	var claims map[string]any
	w.must(json.Unmarshal(given.UnsafePayloadWithoutVerification(), &claims))
	for _, name := range []string{"iat", "nbf", "exp"} {
		at, ok := claims[name].(float64)
		if !ok {
			w.t.Fatalf("the token has %v for %s", claims[name], name)
		}
		claims[name] = int64(at - by.Seconds())
	}
	key, err := keyutil.PrivateKeyFromFile(filepath.Join(filepath.Dir(w.server.Kubeconfig()), "sa.key"))
	w.must(err)
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: given.Signatures[0].Protected.KeyID}}, nil)
	w.must(err)
	text, err := json.Marshal(claims)
	w.must(err)
	signed, err := signer.Sign(text)
	w.must(err)
	out, err := signed.CompactSerialize()
	w.must(err)
	return out
}

// caller speaks to the control plane as an agent does, with whatever token and certificate it is given.
type caller struct {
	w     *world
	token string
	svid  *x509svid.SVID // nil: none
}

func (c caller) connect() *grpc.ClientConn {
	c.w.t.Helper()
	domain := spiffeid.RequireTrustDomainFromString("td.example")
	bundle, err := x509bundle.Parse(domain, []byte(c.w.bundle()))
	c.w.must(err)
	config := tlsconfig.TLSClientConfig(bundle, tlsconfig.AuthorizeID(identity.ControlPlane(domain)))
	config.MinVersion = tls.VersionTLS13
	if c.svid != nil {
		config.GetClientCertificate = tlsconfig.GetClientCertificate(c.svid)
	}
	conn, err := grpc.NewClient("passthrough:///"+agentsAt, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithNoProxy(),
		grpc.WithPerRPCCredentials(attest.Bearer(func() (string, error) { return c.token, nil })))
	c.w.must(err)
	return conn
}

// sign asks for a certificate. The request says that it is for an identity, if one is named, which an honest one leaves out.
func (c caller) sign(claimed ...*url.URL) (*x509svid.SVID, error) {
	c.w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	c.w.must(err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: claimed}, key)
	c.w.must(err)
	conn := c.connect()
	defer func() { _ = conn.Close() }() // nothing is lost that the call has not returned
	ctx, cancel := context.WithTimeout(c.w.t.Context(), patience)
	defer cancel()
	got, err := mantletv1.NewIdentityClient(conn).Sign(ctx, &mantletv1.SignRequest{Csr: csr})
	if err != nil {
		return nil, err
	}
	svid := &x509svid.SVID{PrivateKey: key}
	for _, der := range got.GetCertificateChain() {
		cert, err := x509.ParseCertificate(der)
		c.w.must(err)
		svid.Certificates = append(svid.Certificates, cert)
	}
	svid.ID, err = x509svid.IDFromCert(svid.Certificates[0])
	c.w.must(err)
	return svid, nil
}

// stream asks for the verdicts of a node, and returns what is sent first, and how to wait for the end.
func (c caller) stream(node string) (first *discoveryv3.DeltaDiscoveryResponse, end func() error, err error) {
	c.w.t.Helper()
	conn := c.connect()
	c.w.t.Cleanup(func() { _ = conn.Close() })
	ctx, cancel := context.WithTimeout(c.w.t.Context(), patience)
	c.w.t.Cleanup(cancel)
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return nil, nil, err
	}
	// An error of Send says no more than that the stream has ended; Recv has the reason.
	_ = stream.Send(&discoveryv3.DeltaDiscoveryRequest{Node: &corev3.Node{Id: node}, TypeUrl: xdsnames.TypeVerdicts, ResourceNamesSubscribe: []string{xdsnames.Verdicts}})
	if first, err = stream.Recv(); err != nil {
		return nil, nil, err
	}
	return first, func() error {
		for {
			if _, err := stream.Recv(); err != nil {
				return err
			}
		}
	}, nil
}

// TestAttestation: a control plane signs for, and tells, the very pod that the token is bound to, whatever else the caller says and shows; and nobody else. A
// caller is told no more than that; why is in the log.
func TestAttestation(t *testing.T) {
	w := newWorld(t)
	plane := w.startControlPlane()
	a, b := w.addPod("a", "10.64.0.11"), w.addPod("b", "10.64.0.12")
	w.apply(admit("a", "b"))
	tokenA, tokenB := w.token(a, names.TokenAudience), w.token(b, names.TokenAudience)
	var svidA, svidB *x509svid.SVID
	for _, of := range []struct {
		token string
		svid  **x509svid.SVID
	}{{tokenA, &svidA}, {tokenB, &svidB}} {
		if !until(t.Context(), func() bool { // NotFound until the control plane has heard of the pod
			var err error
			*of.svid, err = caller{w, of.token, nil}.sign()
			return err == nil
		}) {
			t.Fatalf("no certificate:\n%s", plane.log)
		}
	}
	signed := func() int { return strings.Count(plane.log.String(), `msg="identity signed"`) }

	// What the caller says of itself counts for nothing.
	if got, err := (caller{w, tokenB, nil}).sign(svidA.ID.URL()); err != nil || got.ID != svidB.ID || len(got.Certificates[0].URIs) != 1 {
		t.Errorf("b's token, and a request that says a: got %+v, %v, want %s", got, err, svidB.ID)
	}
	verdicts := func(c caller, node string) string {
		first, _, err := c.stream(node)
		if err != nil || len(first.Resources) != 1 {
			t.Fatalf("the stream of %s: %v, %v", node, first, err)
		}
		return string(first.Resources[0].Resource.Value)
	}
	ofA, ofB := verdicts(caller{w, tokenA, svidA}, "shop/a"), verdicts(caller{w, tokenB, svidB}, "shop/b")
	if got := verdicts(caller{w, tokenB, svidB}, "shop/a"); got != ofB || got == ofA {
		t.Error("b is told what is a's when it says that it is a")
	}

	if _, err := (caller{w, w.aged(tokenA, time.Minute), nil}).sign(); err != nil {
		t.Errorf("a token of a minute ago: %v", err)
	}

	before := signed()
	refused := func(name string, err error, since int, code codes.Code, message, why string) {
		t.Helper()
		if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), message) {
			t.Errorf("%s: got %v, want %s with %q", name, err, code, message)
		}
		if !until(t.Context(), func() bool { return strings.Contains(plane.log.String()[since:], why) }) {
			t.Errorf("%s: the log does not say %q, but\n%s", name, why, plane.log.String()[since:])
		}
	}
	const toSign, toStream = "token refused", "present the certificate or token of the pod"
	for _, c := range []struct{ name, token, why string }{
		{"another audience", w.token(a, "vault"), `not for \"mantlet\"`},
		{"the API server's own audience", w.token(a, cluster.Issuer), `not for \"mantlet\"`},
		{"bound to no pod", w.token(nil, names.TokenAudience), "bound to no pod, only to ServiceAccount shop/default"},
		{"expired", w.aged(tokenA, 3*time.Hour), "it expired at"},
	} {
		since := len(plane.log.String())
		_, err := caller{w, c.token, nil}.sign()
		refused(c.name+", to sign", err, since, codes.Unauthenticated, toSign, c.why)
		since = len(plane.log.String())
		_, _, err = caller{w, c.token, svidA}.stream("shop/a")
		refused(c.name+", to stream", err, since, codes.Unauthenticated, toStream, c.why)
	}
	since := len(plane.log.String())
	_, _, err := caller{w, tokenB, svidA}.stream("shop/a")
	refused("b's token and a's certificate", err, since, codes.Unauthenticated, toStream, "presented "+svidA.ID.String())
	since = len(plane.log.String())
	_, _, err = caller{w, tokenB, nil}.stream("shop/b")
	refused("no certificate", err, since, codes.Unauthenticated, toStream, "empty certificates chain")

	// A pod that was deleted: its stream ends, and neither what it was given nor a pod of the same name brings it back.
	_, end, err := caller{w, tokenA, svidA}.stream("shop/a")
	w.must(err)
	w.must(w.client.CoreV1().Pods("shop").Delete(t.Context(), "a", metav1.DeleteOptions{GracePeriodSeconds: new(int64)}))
	if err := end(); status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "shop/a") {
		t.Errorf("the stream of a pod that was deleted ends with %v", err)
	}
	for _, when := range []string{"deleted a moment ago", "deleted, and there is another of its name"} {
		since = len(plane.log.String())
		_, err = caller{w, tokenA, nil}.sign()
		// The review of the token is remembered for some seconds; it is refused once that is over.
		if code := status.Code(err); code != codes.NotFound && code != codes.Unauthenticated {
			t.Errorf("%s, to sign: %v", when, err)
		}
		if log := plane.log.String()[since:]; !strings.Contains(log, "no identity signed") {
			t.Errorf("%s: it is logged\n%s", when, log)
		}
		_, _, err = caller{w, tokenA, svidA}.stream("shop/a")
		refused(when+", to stream", err, since, codes.Unauthenticated, toStream, "stream refused")
		if when == "deleted a moment ago" {
			again := w.createPod("a", "10.64.0.11")
			if !until(t.Context(), func() bool {
				_, err := caller{w, w.token(&sidecarPod{object: again}, names.TokenAudience), nil}.sign()
				return err == nil
			}) {
				t.Fatal("the pod that came after has no certificate")
			}
			before++ // that one
		}
	}
	if n := signed(); n != before {
		t.Errorf("%d certificates were signed for who was refused:\n%s", n-before, plane.log)
	}
	plane.stop()
}
