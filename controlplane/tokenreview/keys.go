package tokenreview

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"golang.org/x/sync/singleflight"
)

// algorithms are those by which API servers sign tokens (k8s.io/kubernetes, serviceaccount: RSA and ECDSA keys).
var algorithms = []jose.SignatureAlgorithm{jose.RS256, jose.ES256, jose.ES384, jose.ES512}

const (
	// fetchAgain is between two requests for the keys: tokens may name any key, and nobody is to have each looked up.
	fetchAgain = 10 * time.Second
	// keysLast is how long keys are used without looking whether there are others.
	keysLast     = time.Hour
	fetchTimeout = 5 * time.Second
)

// errLater is no refusal: the agent is to come again.
var errLater = errors.New("the key that signed it is not known, and the API server's keys were fetched a moment ago; try again")

// keys are the public keys of the API server (RFC 7517), by which it signs tokens. The issuer is not asked for: an API server may have had others,
// and nobody but it has the key.
type keys struct {
	fetch func(context.Context) ([]byte, error)
	now   func() time.Time
	log   *slog.Logger
	group singleflight.Group

	mu    sync.Mutex
	set   jose.JSONWebKeySet
	since time.Time // when set was fetched
	tried time.Time // when it was tried to fetch it last
	err   error     // of that
}

// signed returns nil for a token that the API server signed, and for one of which that cannot be told because its keys cannot be had: a review
// tells. It fails for all others.
func (k *keys) signed(ctx context.Context, token string) error {
	jws, err := jose.ParseSignedCompact(token, algorithms)
	if err != nil {
		return fmt.Errorf("%w: it is not signed as API servers sign: %w", errNoKey, err)
	}
	id := jws.Signatures[0].Protected.KeyID
	if id == "" {
		return fmt.Errorf("%w: it names none", errNoKey)
	}
	key, fresh, err := k.key(id)
	if key == nil || !fresh {
		fetched := k.refresh(ctx)
		key, _, err = k.key(id) // somebody else may have fetched them since
		if fetched && key == nil && err == nil {
			return fmt.Errorf("%w: %q is none of them", errNoKey, id)
		}
	}
	switch {
	case key == nil && err != nil:
		return nil //nolint:nilerr // without keys nothing can be said against it
	case key == nil:
		return errLater
	}
	if _, err := jws.Verify(key); err != nil {
		return fmt.Errorf("%w: the signature is not that of key %q", errNoKey, id)
	}
	return nil
}

// errNoKey begins what is refused for its signature.
var errNoKey = errors.New("it is not signed by a key of the API server")

// key returns a key by its name, nil if it is not known; whether what is known is fresh; and why it is not, if it could not be fetched last.
func (k *keys) key(id string) (key *jose.JSONWebKey, fresh bool, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if found := k.set.Key(id); len(found) > 0 {
		key = &found[0]
	}
	return key, k.now().Sub(k.since) < keysLast, k.err
}

// refresh fetches the keys, unless that was tried a moment ago, and reports whether it did. Who asks meanwhile waits for the same answer.
func (k *keys) refresh(ctx context.Context) (fetched bool) {
	done := k.group.DoChan("", func() (any, error) {
		k.mu.Lock()
		early := !k.tried.IsZero() && k.now().Sub(k.tried) < fetchAgain
		if !early {
			k.tried = k.now()
		}
		k.mu.Unlock()
		if early {
			return false, nil
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
		defer cancel()
		set, err := k.get(ctx)
		k.mu.Lock()
		defer k.mu.Unlock()
		if err != nil {
			k.log.Warn("the API server's keys for tokens cannot be fetched; tokens of keys that are not known are all reviewed", "error", err)
		} else {
			k.set, k.since = set, k.now()
		}
		k.err = err
		return true, nil
	})
	select {
	case r := <-done:
		return r.Val.(bool)
	case <-ctx.Done():
		return false
	}
}

func (k *keys) get(ctx context.Context) (set jose.JSONWebKeySet, err error) {
	b, err := k.fetch(ctx)
	if err != nil {
		return set, err
	}
	if err := json.Unmarshal(b, &set); err != nil {
		return set, fmt.Errorf("not a set of keys: %w", err)
	}
	if len(set.Keys) == 0 {
		return set, errors.New("the set of keys is empty")
	}
	return set, nil
}
