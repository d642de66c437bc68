package attest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
)

// DefaultTTL is how long a minted token is valid unless the configuration says otherwise.
const DefaultTTL = time.Hour

// MinterConfig configures a Minter.
type MinterConfig struct {
	Audience string           // whose tokens Attest accepts; empty: Audience
	TTL      time.Duration    // validity of tokens; zero: DefaultTTL
	Now      func() time.Time // nil: time.Now
}

// Minter makes and checks tokens of pods where no Kubernetes does. It lives in memory: the tokens end with it.
//
// A token is "<id>.<secret>", 128 and 256 random bits. The Minter keeps the id, by which it finds the token, and only a hash of
// the secret, which it compares in constant time. It is safe for concurrent use.
type Minter struct {
	audience string
	ttl      time.Duration
	now      func() time.Time

	mu     sync.Mutex
	tokens map[string]token
	byUID  map[string][]string // pod UID → ids of its tokens
}

type token struct {
	secret   [sha256.Size]byte
	audience string
	pod      Pod
	expires  time.Time
}

// NewMinter returns a Minter without tokens.
func NewMinter(cfg MinterConfig) *Minter {
	m := &Minter{audience: cfg.Audience, ttl: cfg.TTL, now: cfg.Now, tokens: map[string]token{}, byUID: map[string][]string{}}
	if m.audience == "" {
		m.audience = Audience
	}
	if m.ttl == 0 {
		m.ttl = DefaultTTL
	}
	if m.now == nil {
		m.now = time.Now
	}
	return m
}

// Mint makes a token for a pod and an audience and says when it ends. Earlier tokens of the pod stay valid until they end.
func (m *Minter) Mint(pod Pod, audience string) (text string, expires time.Time, err error) {
	if err := pod.check(); err != nil {
		return "", time.Time{}, fmt.Errorf("mint a token: %w", err)
	}
	if audience == "" {
		return "", time.Time{}, fmt.Errorf("mint a token for pod %s: no audience", pod)
	}
	var random [48]byte
	if _, err := rand.Read(random[:]); err != nil {
		return "", time.Time{}, fmt.Errorf("mint a token for pod %s: %w", pod, err)
	}
	id, secret := encode(random[:16]), encode(random[16:])
	m.mu.Lock()
	defer m.mu.Unlock()
	expires = m.now().Add(m.ttl)
	m.dropExpired(pod.UID)
	m.tokens[id] = token{secret: sha256.Sum256([]byte(secret)), audience: audience, pod: pod, expires: expires}
	m.byUID[pod.UID] = append(m.byUID[pod.UID], id)
	return id + "." + secret, expires, nil
}

// Revoke ends all tokens of a pod at once; call it when the pod is deleted.
func (m *Minter) Revoke(uid string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range m.byUID[uid] {
		delete(m.tokens, id)
	}
	delete(m.byUID, uid)
}

// Attest implements Attestor.
func (m *Minter) Attest(_ context.Context, text string) (Pod, error) {
	id, secret, ok := strings.Cut(text, ".")
	if !ok {
		return Pod{}, fmt.Errorf("%w: not one of ours", ErrRefused)
	}
	sum := sha256.Sum256([]byte(secret))
	m.mu.Lock()
	defer m.mu.Unlock()
	t, known := m.tokens[id] // an unknown id compares with the zero hash, which no secret has
	same := subtle.ConstantTimeCompare(sum[:], t.secret[:]) == 1
	var why error
	switch {
	case !known || !same:
		why = errors.New("unknown or revoked")
	case t.audience != m.audience:
		why = fmt.Errorf("token of pod %s is for audience %q, not %q", t.pod, t.audience, m.audience)
	case !m.now().Before(t.expires):
		why = fmt.Errorf("token of pod %s expired at %s", t.pod, t.expires.UTC().Format(time.RFC3339))
	default:
		return t.pod, nil
	}
	return Pod{}, fmt.Errorf("%w: %w", ErrRefused, why)
}

// dropExpired forgets the tokens of a pod that have ended, so that a pod that renews for months does not pile them up.
func (m *Minter) dropExpired(uid string) {
	var left []string
	for _, id := range m.byUID[uid] {
		if m.now().Before(m.tokens[id].expires) {
			left = append(left, id)
		} else {
			delete(m.tokens, id)
		}
	}
	m.byUID[uid] = left
}

func encode(b []byte) string { return base64.RawURLEncoding.EncodeToString(b) }
