package tokenreview

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/identity/attest"
)

// scripted answers each review with what it was told to, and counts them.
type scripted struct {
	status authenticationv1.TokenReviewStatus
	err    error
	asked  int
}

func (s *scripted) Create(_ context.Context, r *authenticationv1.TokenReview, _ metav1.CreateOptions) (*authenticationv1.TokenReview, error) {
	s.asked++
	r = r.DeepCopy()
	r.Status = s.status
	return r, s.err
}

// jwt is a token that says this of itself; nobody here looks at its signature.
func jwt(t *testing.T, payload map[string]any) string {
	t.Helper()
	b, err := json.Marshal(payload)
	if err != nil {
		t.Fatal(err)
	}
	return "e30." + base64.RawURLEncoding.EncodeToString(b) + ".c2ln"
}

func accepting(pod, uid []string) authenticationv1.TokenReviewStatus {
	return authenticationv1.TokenReviewStatus{Authenticated: true, Audiences: []string{attest.Audience}, User: authenticationv1.UserInfo{
		Username: "system:serviceaccount:shop:api",
		Extra:    map[string]authenticationv1.ExtraValue{extraPodName: pod, extraPodUID: uid},
	}}
}

func TestAttest(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	good := map[string]any{"aud": []string{"other", attest.Audience}, "exp": now.Add(time.Hour).Unix()}
	bound := accepting([]string{"api-1"}, []string{"u1"})
	change := func(f func(*authenticationv1.TokenReviewStatus)) authenticationv1.TokenReviewStatus {
		s := *bound.DeepCopy()
		f(&s)
		return s
	}
	for _, c := range []struct {
		name   string
		token  string
		status authenticationv1.TokenReviewStatus
		err    error
		asked  int
		why    string // "": accepted
	}{
		{"good", jwt(t, good), bound, nil, 1, ""},
		{"one audience, not in a list", jwt(t, map[string]any{"aud": attest.Audience, "exp": now.Add(time.Second).Unix()}), bound, nil, 1, ""},
		{"expired by our clock, within its leeway: the API server says", jwt(t, map[string]any{"aud": attest.Audience, "exp": now.Unix()}), bound, nil, 1, ""},

		{"no token", "secret", bound, nil, 0, "not a JSON Web Token"},
		{"nothing in it", "a..b", bound, nil, 0, "not a JSON Web Token"},
		{"another audience", jwt(t, map[string]any{"aud": "https://kubernetes.default.svc", "exp": now.Add(time.Hour).Unix()}), bound, nil, 0, `not for "mantlet"`},
		{"expired", jwt(t, map[string]any{"aud": attest.Audience, "exp": now.Add(-2 * time.Minute).Unix()}), bound, nil, 0, "expired at"},
		{"of the old kind, without an end", jwt(t, map[string]any{"aud": attest.Audience}), bound, nil, 0, "no end"},

		{"not authentic", jwt(t, good), authenticationv1.TokenReviewStatus{Error: "service account token has been invalidated"}, nil, 1, "has been invalidated"},
		{"not authentic, who knows why", jwt(t, good), authenticationv1.TokenReviewStatus{}, nil, 1, "no reason"},
		{"an API server that knows no audiences", jwt(t, good), change(func(s *authenticationv1.TokenReviewStatus) { s.Audiences = nil }), nil, 1, `not for "mantlet"`},
		{"a person", jwt(t, good), change(func(s *authenticationv1.TokenReviewStatus) { s.User.Username = "jane" }), nil, 1, "no ServiceAccount"},
		{"bound to no pod", jwt(t, good), accepting(nil, nil), nil, 1, "bound to no pod"},
		{"without UID", jwt(t, good), accepting([]string{"api-1"}, nil), nil, 1, "bound to no pod"},
		{"of two pods", jwt(t, good), accepting([]string{"api-1", "api-2"}, []string{"u1"}), nil, 1, "bound to no pod"},
	} {
		s := &scripted{status: c.status, err: c.err}
		pod, err := New(Config{Reviews: s, Now: func() time.Time { return now }}).Attest(t.Context(), c.token)
		switch {
		case c.why == "" && (err != nil || pod != attest.Pod{Namespace: "shop", Name: "api-1", UID: "u1"}):
			t.Errorf("%s: got %v, %v", c.name, pod, err)
		case c.why != "" && (!errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), c.why) || pod != attest.Pod{}):
			t.Errorf("%s: got %v, %v, want a refusal with %q", c.name, pod, err, c.why)
		case s.asked != c.asked:
			t.Errorf("%s: the API server was asked %d times, want %d", c.name, s.asked, c.asked)
		}
	}
}

// TestUnanswered: an API server that does not answer refuses nobody: agents are to come again.
func TestUnanswered(t *testing.T) {
	s := &scripted{err: errors.New("connection refused")}
	_, err := New(Config{Reviews: s}).Attest(t.Context(), jwt(t, map[string]any{"aud": attest.Audience, "exp": time.Now().Add(time.Hour).Unix()}))
	if err == nil || errors.Is(err, attest.ErrRefused) {
		t.Errorf("got %v", err)
	}
}

// TestRemember: what was accepted is not asked again for a while, never past the token's end; a refusal is not remembered.
func TestRemember(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	s := &scripted{}
	a := New(Config{Reviews: s, Now: func() time.Time { return now }})
	long := jwt(t, map[string]any{"aud": attest.Audience, "exp": now.Add(time.Hour).Unix()})
	short := jwt(t, map[string]any{"aud": attest.Audience, "exp": now.Add(3 * time.Second).Unix()})
	ask := func(token string, asked int, accepted bool) {
		t.Helper()
		_, err := a.Attest(t.Context(), token)
		if s.asked != asked || (err == nil) != accepted {
			t.Errorf("asked %d times, want %d; %v, want accepted %t", s.asked, asked, err, accepted)
		}
	}
	ask(long, 1, false)
	s.status = accepting([]string{"api-1"}, []string{"u1"})
	ask(long, 2, true)
	ask(short, 3, true)
	now = now.Add(3 * time.Second)
	ask(long, 3, true)
	ask(short, 4, true) // the API server has the last word about clocks
	now = now.Add(DefaultRemember)
	s.status = authenticationv1.TokenReviewStatus{Error: "the pod is gone"}
	ask(long, 5, false)
	ask(short, 6, false)
}

// TestRememberIsBounded: more tokens than there is room for are asked for again, and room that has become free is used.
func TestRememberIsBounded(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	s := &scripted{status: accepting([]string{"api-1"}, []string{"u1"})}
	a := New(Config{Reviews: s, Now: func() time.Time { return now }})
	token := func(i int) string {
		return jwt(t, map[string]any{"aud": attest.Audience, "exp": now.Add(time.Hour).Unix(), "jti": fmt.Sprint(i)})
	}
	for i := range mostRecent + 5 {
		if _, err := a.Attest(t.Context(), token(i)); err != nil {
			t.Fatal(err)
		}
	}
	if len(a.recent.known) != mostRecent {
		t.Errorf("%d are remembered, want %d", len(a.recent.known), mostRecent)
	}
	now = now.Add(DefaultRemember)
	if _, err := a.Attest(t.Context(), token(-1)); err != nil || len(a.recent.known) != 1 {
		t.Errorf("%d are remembered after their time, want 1; %v", len(a.recent.known), err)
	}
}

func FuzzClaims(f *testing.F) {
	f.Add("e30.e30.e30")
	f.Add("e30.eyJhdWQiOiJtYW50bGV0IiwiZXhwIjoxZTk5OX0.x")
	f.Add("e30.eyJhdWQiOlsibWFudGxldCJdLCJleHAiOi0xfQ.x")
	f.Fuzz(func(_ *testing.T, token string) {
		if c, err := readClaims(token); err == nil {
			_ = c.check(attest.Audience, time.Now())
		}
	})
}
