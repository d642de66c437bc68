// Package tokenreview attests pods by their ServiceAccount tokens, as the API server reviews them (authentication.k8s.io/v1 TokenReview).
//
//	token ──► claims: a token at all, ours, not over? ──► what was reviewed a moment ago? ──► signed by a key of the API server? ──► TokenReview ──► pod
//	               no: refused, and nobody is asked                                                no: the same
//
// Anybody who reaches the agents' port may show tokens, and the API server reviews only so many a second. So it is asked about none that it has not
// signed: its public keys tell (its /openid/v1/jwks). That alone accepts nobody: whether the pod is still there only a review says. Where the
// keys cannot be had all tokens are reviewed. One that is signed and refused is not asked about again for a second.
//
// A token is accepted if the API server says that it is authentic for our audience and tells the pod that it is bound to, by name and UID,
// which it does for the projected tokens that kubelets get (serviceaccount tokens bound to pods, Kubernetes 1.22 and later). The
// API server refuses tokens whose pod is gone.
//
// An agent shows the same token two times in a row, for its certificate and for its configuration; and when a control plane starts anew all
// of them come at once. So what was accepted is remembered for a few seconds, as the API server itself does. A pod that was deleted meanwhile
// gains nothing by that: attest.Resolve looks each pod up, and one that is gone is not found.
package tokenreview

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/mantlet/mantlet/identity/attest"
)

// The keys of user.extra in which the API server tells the pod that a token is bound to.
const (
	extraPodName = "authentication.kubernetes.io/pod-name"
	extraPodUID  = "authentication.kubernetes.io/pod-uid"
)

// userPrefix begins the names of ServiceAccounts as users: system:serviceaccount:NAMESPACE:NAME.
const userPrefix = "system:serviceaccount:"

// Reviews asks the API server; the AuthenticationV1().TokenReviews() of a clientset does.
type Reviews interface {
	Create(context.Context, *authenticationv1.TokenReview, metav1.CreateOptions) (*authenticationv1.TokenReview, error)
}

// Config is what an Attestor needs. Only Reviews is required.
type Config struct {
	Reviews  Reviews
	Audience string           // whose tokens are accepted; empty: attest.Audience
	Remember time.Duration    // how long what was accepted is not asked again; zero: DefaultRemember; negative: not at all
	Now      func() time.Time // nil: time.Now
	// Keys fetches the API server's keys for tokens, a JSON Web Key Set; JWKS makes one. Nil: signatures are left to reviews.
	Keys func(context.Context) ([]byte, error)
	Log  *slog.Logger // nil: nothing is logged
}

// JWKS fetches the keys by a client of the API server, whose user has to be allowed to get the path /openid/v1/jwks (as ClusterRole
// system:service-account-issuer-discovery says).
func JWKS(c rest.Interface) func(context.Context) ([]byte, error) {
	return func(ctx context.Context) ([]byte, error) { return c.Get().AbsPath("/openid/v1/jwks").DoRaw(ctx) }
}

// refusalLasts is how long a refusal of the API server is not asked for again: whoever has one token of a pod that is gone could spend all reviews on it.
const refusalLasts = time.Second

// DefaultRemember is as long as API servers themselves remember a review that succeeded.
const DefaultRemember = 10 * time.Second

// Attestor is an attest.Attestor. It is safe for concurrent use.
type Attestor struct {
	reviews  Reviews
	audience string
	now      func() time.Time
	recent   recent
	keys     *keys // nil: signatures are not looked at
}

var _ attest.Attestor = (*Attestor)(nil)

// New returns an Attestor.
func New(cfg Config) *Attestor {
	a := &Attestor{reviews: cfg.Reviews, audience: cfg.Audience, now: cfg.Now}
	if a.audience == "" {
		a.audience = attest.Audience
	}
	if a.now == nil {
		a.now = time.Now
	}
	if cfg.Remember == 0 {
		cfg.Remember = DefaultRemember
	}
	a.recent = newRecent(cfg.Remember)
	if cfg.Keys != nil {
		if cfg.Log == nil {
			cfg.Log = slog.New(slog.DiscardHandler)
		}
		a.keys = &keys{fetch: cfg.Keys, now: a.now, log: cfg.Log}
	}
	return a
}

// Attest implements attest.Attestor. An API server that does not answer is an error that does not wrap attest.ErrRefused.
func (a *Attestor) Attest(ctx context.Context, token string) (attest.Pod, error) {
	c, err := readClaims(token)
	if err != nil {
		return refused(err)
	}
	now := a.now()
	if err := c.check(a.audience, now); err != nil {
		return refused(err)
	}
	sum := sha256.Sum256([]byte(token))
	if r, ok := a.recent.get(sum, now); ok {
		return r.pod, r.err
	}
	if a.keys != nil {
		switch err := a.keys.signed(ctx, token); {
		case errors.Is(err, errLater):
			return attest.Pod{}, err
		case err != nil:
			return refused(err)
		}
	}
	r, err := a.reviews.Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{a.audience}}}, metav1.CreateOptions{})
	if err != nil {
		return attest.Pod{}, fmt.Errorf("review a token: %w", err)
	}
	pod, err := a.boundTo(&r.Status)
	if err != nil {
		pod, err = refused(err)
		if a.keys != nil { // else forged ones would take the room
			a.recent.put(sum, reviewed{err: err}, now, now.Add(refusalLasts))
		}
		return pod, err
	}
	a.recent.put(sum, reviewed{pod: pod}, now, c.expires())
	return pod, nil
}

func refused(why error) (attest.Pod, error) {
	return attest.Pod{}, fmt.Errorf("%w: %w", attest.ErrRefused, why)
}

// boundTo reads from a review which pod the token is bound to.
func (a *Attestor) boundTo(s *authenticationv1.TokenReviewStatus) (attest.Pod, error) {
	if !s.Authenticated {
		why := s.Error
		if why == "" {
			why = "it gives no reason"
		}
		return attest.Pod{}, fmt.Errorf("the API server does not accept it: %s", why)
	}
	if !slices.Contains(s.Audiences, a.audience) { // empty: an authenticator that knows of no audiences, whose word is not enough
		return attest.Pod{}, fmt.Errorf("the API server accepts it for audiences %q, not for %q", s.Audiences, a.audience)
	}
	account, ok := strings.CutPrefix(s.User.Username, userPrefix)
	namespace, name, both := strings.Cut(account, ":")
	if !ok || !both || namespace == "" || name == "" {
		return attest.Pod{}, fmt.Errorf("it is of user %q, which is no ServiceAccount", s.User.Username)
	}
	podName, uid := s.User.Extra[extraPodName], s.User.Extra[extraPodUID]
	if len(podName) != 1 || len(uid) != 1 || podName[0] == "" || uid[0] == "" {
		return attest.Pod{}, fmt.Errorf("it is bound to no pod, only to ServiceAccount %s/%s; use the projected token of the pod", namespace, name)
	}
	return attest.Pod{Namespace: namespace, Name: podName[0], UID: uid[0]}, nil
}

var errNoJWT = errors.New("not a JSON Web Token; use the projected token of the pod")
