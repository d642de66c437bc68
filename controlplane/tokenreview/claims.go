package tokenreview

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// claims are what a token says of itself (RFC 7519, section 4.1). Nothing is accepted for it: it spares the API server the tokens that it
// would refuse, and bounds how long an accepted one is remembered.
type claims struct {
	Audience audiences `json:"aud"`
	Expires  float64   `json:"exp"` // seconds since 1970
}

// audiences is one string or a list of them.
type audiences []string

func (a *audiences) UnmarshalJSON(b []byte) error {
	var one string
	if json.Unmarshal(b, &one) == nil {
		*a = audiences{one}
		return nil
	}
	var list []string
	err := json.Unmarshal(b, &list)
	*a = list
	return err
}

func readClaims(token string) (claims, error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return claims{}, errNoJWT
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return claims{}, errNoJWT
	}
	var c claims
	if err := json.Unmarshal(text, &c); err != nil {
		return claims{}, errNoJWT
	}
	return c, nil
}

func (c claims) check(audience string, now time.Time) error {
	switch {
	case !slices.Contains(c.Audience, audience):
		return fmt.Errorf("it is for audiences %q, not for %q", []string(c.Audience), audience)
	case c.Expires == 0:
		return fmt.Errorf("it has no end; use the projected token of the pod")
	case !now.Before(c.expires().Add(leeway)):
		return fmt.Errorf("it expired at %s", c.expires().UTC().Format(time.RFC3339))
	}
	return nil
}

// leeway is for clocks that differ: the API server has the last word.
const leeway = time.Minute

func (c claims) expires() time.Time { return time.Unix(int64(c.Expires), 0) }
