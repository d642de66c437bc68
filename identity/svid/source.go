// Package svid keeps a workload's X.509-SVID and trust bundle current.
//
//	Builtin: new key ──CSR + token, TLS──► control plane ──chain + roots──► verified, held in memory ──► Source
//	            ▲                                                              │
//	            └────────────── at half-life, ±10 % ───────────────────────────┘
//
// A private key never leaves the process by any other way than [Source], and is replaced at each renewal.
package svid

import (
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Source holds one workload's X.509-SVID and the trust bundle of its trust domain. GetX509SVID fails while there is none, and
// once it has expired: what a Source hands out is valid at that moment.
type Source interface {
	x509svid.Source
	x509bundle.Source
	// Updated returns a channel that is closed at the next change. Take it before reading, so that no change is missed.
	Updated() <-chan struct{}
}
