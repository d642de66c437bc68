package sandbox

import (
	"time"

	"github.com/mantlet/mantlet/xds"
)

// Lifetimes are how long what proves an identity is good for. The zero value is what a cluster has.
type Lifetimes struct {
	SVID       time.Duration // validity of X.509-SVIDs; zero: ca.DefaultTTL
	RenewAfter time.Duration // age at which they are renewed, if that is before half of it; zero: at half of it
	Sessions   time.Duration // how long TLS sessions may be resumed; zero: sds.SessionBound
	Resumption xds.Resumption
}

// flags are those of the agent.
func (l Lifetimes) flags() []string {
	var out []string
	if l.RenewAfter > 0 {
		out = append(out, "--renew-after", l.RenewAfter.String())
	}
	if l.Sessions > 0 {
		out = append(out, "--session-bound", l.Sessions.String())
	}
	return out
}
