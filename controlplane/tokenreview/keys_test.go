package tokenreview

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/mantlet/mantlet/identity/attest"
)

// issuer signs tokens and publishes its keys, as an API server does.
type issuer struct {
	t       *testing.T
	private map[string]*ecdsa.PrivateKey
	public  jose.JSONWebKeySet
	err     error // instead of keys
	fetched int
}

func newIssuer(t *testing.T, ids ...string) *issuer {
	i := &issuer{t: t, private: map[string]*ecdsa.PrivateKey{}}
	for _, id := range ids {
		i.rotate(id)
	}
	return i
}

func (i *issuer) rotate(id string) {
	i.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		i.t.Fatal(err)
	}
	i.private[id] = key
	i.public.Keys = append(i.public.Keys, jose.JSONWebKey{Key: key.Public(), KeyID: id, Algorithm: string(jose.ES256), Use: "sig"})
}

func (i *issuer) fetch(context.Context) ([]byte, error) {
	i.fetched++
	if i.err != nil {
		return nil, i.err
	}
	return json.Marshal(i.public)
}

// token is signed by the key with an ID of its own, under another one's name where that is given.
func (i *issuer) token(by, name string, now time.Time) string {
	i.t.Helper()
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: i.private[by], KeyID: name}}, nil)
	if err != nil {
		i.t.Fatal(err)
	}
	payload, err := json.Marshal(map[string]any{"aud": attest.Audience, "exp": now.Add(time.Hour).Unix()})
	if err != nil {
		i.t.Fatal(err)
	}
	signed, err := signer.Sign(payload)
	if err != nil {
		i.t.Fatal(err)
	}
	text, err := signed.CompactSerialize()
	if err != nil {
		i.t.Fatal(err)
	}
	return text
}

// TestForgedTokensAreNotReviewed: a review is spent on what the API server signed, and on nothing else; its keys are fetched when a token names one that
// is not known, and not more often than is bearable.
func TestForgedTokensAreNotReviewed(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	i, thief := newIssuer(t, "one"), newIssuer(t, "one", "two")
	s := &scripted{status: accepting([]string{"api-1"}, []string{"u1"})}
	a := New(Config{Reviews: s, Now: func() time.Time { return now }, Keys: i.fetch, Remember: -1})
	asked, fetched := 0, 0
	want := func(what, token, why string, reviews, fetches int) {
		t.Helper()
		_, err := a.Attest(t.Context(), token)
		switch asked, fetched = asked+reviews, fetched+fetches; {
		case why == "" && err != nil, why != "" && (!errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), why)):
			t.Errorf("%s: got %v, want %q", what, err, why)
		case s.asked != asked || i.fetched != fetched:
			t.Errorf("%s: %d reviews and the keys %d times in all, want %d and %d", what, s.asked, i.fetched, asked, fetched)
		}
	}
	want("signed", i.token("one", "one", now), "", 1, 1)
	want("signed by somebody else", thief.token("one", "one", now), `not that of key "one"`, 0, 0)
	want("by no key at all", i.token("one", "", now), "names none", 0, 0)
	head, rest, _ := strings.Cut(i.token("one", "one", now), ".")
	want("no signature", head+"."+strings.Split(rest, ".")[0]+".", "not that of key", 0, 0)
	want("of the algorithm none", jwt(t, map[string]any{"aud": attest.Audience, "exp": now.Add(time.Hour).Unix()}), "as API servers sign", 0, 0)

	i.rotate("two")
	if _, err := a.Attest(t.Context(), i.token("two", "two", now)); err == nil || errors.Is(err, attest.ErrRefused) || s.asked != asked || i.fetched != fetched {
		t.Errorf("a new key, a moment after the keys were fetched: got %v, want an error that is no refusal", err)
	}
	now = now.Add(fetchAgain)
	want("a new key", i.token("two", "two", now), "", 1, 1)
	want("signed by somebody else", thief.token("two", "two", now), `not that of key "two"`, 0, 0)
	now = now.Add(fetchAgain)
	want("a key that there is not", thief.token("two", "three", now), `"three" is none of them`, 0, 1)

	now = now.Add(keysLast)
	i.err = errors.New("the API server is away")
	want("known keys stay known", i.token("two", "two", now), "", 1, 1)
	want("signed by somebody else", thief.token("two", "two", now), "not that of key", 0, 0)
	want("where keys cannot be had a review tells", i.token("two", "four", now), "", 1, 0)
	i.err = nil
	now = now.Add(fetchAgain)
	i.public.Keys = i.public.Keys[1:]
	want("a key that is taken back", i.token("one", "one", now), `"one" is none of them`, 0, 1)
}

// TestWithoutKeysAllAreReviewed: as long as there have been none.
func TestWithoutKeysAllAreReviewed(t *testing.T) {
	for what, keys := range map[string]func(context.Context) ([]byte, error){
		"forbidden": func(context.Context) ([]byte, error) { return nil, errors.New("forbidden") },
		"no keys":   func(context.Context) ([]byte, error) { return []byte(`{"keys":[]}`), nil },
		"no JSON":   func(context.Context) ([]byte, error) { return []byte(`<html>`), nil },
	} {
		s := &scripted{status: accepting([]string{"api-1"}, []string{"u1"})}
		i := newIssuer(t, "one")
		if _, err := New(Config{Reviews: s, Keys: keys}).Attest(t.Context(), i.token("one", "one", time.Now())); err != nil || s.asked != 1 {
			t.Errorf("%s: got %v, %d reviews", what, err, s.asked)
		}
	}
}

// TestSignedRefusalsLast: one token of a pod that is gone does not spend a review each time.
func TestSignedRefusalsLast(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	i := newIssuer(t, "one")
	s := &scripted{status: authenticationv1.TokenReviewStatus{Error: "the pod is gone"}}
	a := New(Config{Reviews: s, Now: func() time.Time { return now }, Keys: i.fetch})
	token := i.token("one", "one", now)
	for range 10 {
		if _, err := a.Attest(t.Context(), token); !errors.Is(err, attest.ErrRefused) || !strings.Contains(err.Error(), "the pod is gone") {
			t.Errorf("got %v", err)
		}
	}
	if s.asked != 1 {
		t.Errorf("%d reviews of one token", s.asked)
	}
	now = now.Add(refusalLasts)
	s.status = accepting([]string{"api-1"}, []string{"u1"})
	if _, err := a.Attest(t.Context(), token); err != nil {
		t.Errorf("a second later: %v", err)
	}
}
