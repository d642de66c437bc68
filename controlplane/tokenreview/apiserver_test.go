package tokenreview

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc/metadata"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/apitest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counting counts what the API server is asked.
type counting struct {
	Reviews
	n int
}

func (c *counting) Create(ctx context.Context, r *authenticationv1.TokenReview, o metav1.CreateOptions) (*authenticationv1.TokenReview, error) {
	c.n++
	return c.Reviews.Create(ctx, r, o)
}

// forge signs what a token says by another key under the same name.
func forge(t *testing.T, token string) string {
	t.Helper()
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		t.Fatal(err)
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.RS256, Key: jose.JSONWebKey{Key: key, KeyID: jws.Signatures[0].Protected.KeyID}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := signer.Sign(jws.UnsafePayloadWithoutVerification())
	if err != nil {
		t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// TestAPIServer: a token that a real API server gave is good for the pod that it is bound to, for our audience and no other, while the pod is there.
func TestAPIServer(t *testing.T) {
	s := apitest.Start(t, cluster.APIServerOptions{})
	c := apitest.Client(t, s)
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "api"}}
	if _, err := c.CoreV1().ServiceAccounts("default").Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	make := func(name string) *corev1.Pod {
		t.Helper()
		p, err := c.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.PodSpec{ServiceAccountName: "api", Containers: []corev1.Container{{Name: "app", Image: "localhost/app:1"}}}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	token := func(p *corev1.Pod, audience string) string {
		t.Helper()
		request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}
		if p != nil {
			request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: p.UID}
		}
		r, err := c.CoreV1().ServiceAccounts("default").CreateToken(t.Context(), "api", request, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status.Token
	}
	first, second := make("first"), make("second")
	podOf := func(p *corev1.Pod) attest.Pod {
		return attest.Pod{Namespace: p.Namespace, Name: p.Name, UID: string(p.UID)}
	}
	reviews := c.AuthenticationV1().TokenReviews()
	a := New(Config{Reviews: reviews, Remember: -1})

	of1, of2 := token(first, attest.Audience), token(second, attest.Audience)
	for text, want := range map[string]attest.Pod{of1: podOf(first), of2: podOf(second)} {
		if got, err := a.Attest(t.Context(), text); err != nil || got != want {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
	}
	counted := &counting{Reviews: reviews}
	checked := New(Config{Reviews: counted, Remember: -1, Keys: JWKS(c.Discovery().RESTClient())})
	for text, want := range map[string]attest.Pod{of1: podOf(first), of2: podOf(second)} {
		if got, err := checked.Attest(t.Context(), text); err != nil || got != want {
			t.Errorf("with the signature looked at: got %v, %v, want %v", got, err, want)
		}
	}
	head, claims, _ := strings.Cut(of1, ".")
	forged := head + "." + claims[:len(claims)-4] + "AAAA"
	for _, r := range []struct {
		name, token, why string
		attestor         *Attestor
	}{
		{"another audience", token(first, "vault"), `not for "mantlet"`, a},
		{"the API server's own audience", token(first, cluster.Issuer), `not for "mantlet"`, a},
		{"another audience, by the API server's word", of1, "vault", New(Config{Reviews: reviews, Audience: "vault", Remember: -1})},
		{"bound to no pod", token(nil, attest.Audience), "bound to no pod", a},
		{"another signature", forged, "does not accept it", a},
		{"another signature, which is looked at", forged, "not that of key", checked},
		{"a forged token, which names the API server's key", forge(t, of1), "not that of key", checked},
		{"expired", of1, "expired at", New(Config{Reviews: reviews, Now: func() time.Time { return time.Now().Add(24 * time.Hour) }})},
	} {
		pod, err := r.attestor.Attest(t.Context(), r.token)
		if !errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), r.why) || pod != (attest.Pod{}) {
			t.Errorf("%s: got %v, %v, want a refusal with %q", r.name, pod, err, r.why)
		}
	}

	if counted.n != 2 {
		t.Errorf("%d reviews, want one for each token that the API server signed", counted.n)
	}

	// A deleted pod: its identity is gone as soon as the control plane knows, though the API server remembers the token for some seconds.
	now := metav1.DeleteOptions{GracePeriodSeconds: new(int64), Preconditions: metav1.NewUIDPreconditions(string(first.UID))}
	if err := c.CoreV1().Pods("default").Delete(t.Context(), "first", now); err != nil {
		t.Fatal(err)
	}
	again := make("first")
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("authorization", "Bearer "+of1))
	known := func(p attest.Pod) (spiffeid.ID, error) {
		if p != podOf(again) {
			return spiffeid.ID{}, attest.ErrUnknownPod
		}
		return spiffeid.RequireFromString("spiffe://td.example/x"), nil
	}
	if pod, id, err := attest.Resolve(ctx, a, known); err == nil {
		t.Errorf("the token of a pod that is gone speaks for %s, %s", pod, id)
	}
	end := time.Now().Add(time.Minute)
	look := time.NewTicker(200 * time.Millisecond)
	defer look.Stop()
	for {
		if _, err := a.Attest(t.Context(), of1); errors.Is(err, attest.ErrRefused) {
			t.Logf("refused: %v", err)
			break
		} else if time.Now().After(end) {
			t.Fatalf("a minute after its pod was deleted a token is accepted: %v", err)
		}
		<-look.C
	}
	if got, err := a.Attest(t.Context(), token(again, attest.Audience)); err != nil || got != podOf(again) {
		t.Errorf("the pod that came after: got %v, %v", got, err)
	}

	if err := s.Shutdown(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Attest(t.Context(), of2); err == nil || errors.Is(err, attest.ErrRefused) {
		t.Errorf("an API server that is away: got %v, want an error that is no refusal", err)
	}
}
