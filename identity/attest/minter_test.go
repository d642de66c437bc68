package attest

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

var (
	web0  = Pod{Namespace: "shop", Name: "web-0", UID: "u1"}
	web1  = Pod{Namespace: "shop", Name: "web-1", UID: "u2"}
	start = time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
)

type clock struct{ t time.Time }

func (c *clock) now() time.Time { return c.t }

func mint(t *testing.T, m *Minter, pod Pod, audience string) string {
	t.Helper()
	token, _, err := m.Mint(pod, audience)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func accepted(m *Minter, token string) (Pod, bool) {
	pod, err := m.Attest(context.Background(), token)
	if err != nil && (!errors.Is(err, ErrRefused) || pod != (Pod{})) {
		panic(err)
	}
	return pod, err == nil
}

func TestTokenNamesItsPod(t *testing.T) {
	now := &clock{start}
	m := NewMinter(MinterConfig{Now: now.now, TTL: time.Hour})
	a, b := mint(t, m, web0, Audience), mint(t, m, web1, Audience)
	if p, ok := accepted(m, a); !ok || p != web0 {
		t.Errorf("%v, %v", p, ok)
	}
	if p, ok := accepted(m, b); !ok || p != web1 {
		t.Errorf("%v, %v", p, ok)
	}
	if again := mint(t, m, web0, Audience); again == a {
		t.Error("two tokens are the same")
	} else if _, ok := accepted(m, a); !ok {
		t.Error("a second token ends the first")
	}
}

func TestTokenRefused(t *testing.T) {
	now := &clock{start}
	m := NewMinter(MinterConfig{Now: now.now, TTL: time.Hour})
	good, other := mint(t, m, web0, Audience), mint(t, m, web1, Audience)
	id, secret, _ := strings.Cut(good, ".")
	_, otherSecret, _ := strings.Cut(other, ".")
	for name, token := range map[string]string{
		"empty":            "",
		"dot":              ".",
		"id alone":         id,
		"id and dot":       id + ".",
		"secret alone":     "." + secret,
		"shortened":        good[:len(good)-1],
		"lengthened":       good + "A",
		"another's secret": id + "." + otherSecret,
		"other audience":   mint(t, m, web0, "vault"),
		"another minter's": mint(t, NewMinter(MinterConfig{}), web0, Audience),
	} {
		if p, ok := accepted(m, token); ok {
			t.Errorf("%s: accepted for %v", name, p)
		}
	}
	now.t = start.Add(time.Hour - time.Nanosecond)
	if _, ok := accepted(m, good); !ok {
		t.Error("refused before it ends")
	}
	now.t = start.Add(time.Hour)
	if _, ok := accepted(m, good); ok {
		t.Error("accepted after it has ended")
	}
}

func TestRevoke(t *testing.T) {
	m := NewMinter(MinterConfig{})
	a, b, other := mint(t, m, web0, Audience), mint(t, m, web0, Audience), mint(t, m, web1, Audience)
	m.Revoke(web0.UID)
	for _, token := range []string{a, b} {
		if _, ok := accepted(m, token); ok {
			t.Error("a revoked token is accepted")
		}
	}
	if _, ok := accepted(m, other); !ok {
		t.Error("another pod's token is revoked too")
	}
	if len(m.tokens) != 1 || len(m.byUID) != 1 {
		t.Errorf("%d tokens, %d pods left", len(m.tokens), len(m.byUID))
	}
}

func TestExpiredTokensDoNotPileUp(t *testing.T) {
	now := &clock{start}
	m := NewMinter(MinterConfig{Now: now.now, TTL: time.Hour})
	for range 100 {
		mint(t, m, web0, Audience)
		now.t = now.t.Add(30 * time.Minute)
	}
	if len(m.tokens) > 3 || len(m.byUID[web0.UID]) > 3 {
		t.Errorf("%d tokens kept", len(m.tokens))
	}
}

func TestMintRefuses(t *testing.T) {
	m := NewMinter(MinterConfig{})
	for _, pod := range []Pod{{}, {Namespace: "a", Name: "b"}, {Namespace: "a", UID: "c"}, {Name: "b", UID: "c"}} {
		if _, _, err := m.Mint(pod, Audience); err == nil {
			t.Errorf("a token for %+v", pod)
		}
	}
	if _, _, err := m.Mint(web0, ""); err == nil {
		t.Error("a token without audience")
	}
}
