package tokenreview

import (
	"crypto/sha256"
	"sync"
	"time"

	"github.com/mantlet/mantlet/identity/attest"
)

// mostRecent bounds what is remembered: about 1 MB.
const mostRecent = 10_000

// recent remembers for a moment which tokens, by their hash, were accepted.
type recent struct {
	lasts time.Duration

	mu    sync.Mutex
	known map[[sha256.Size]byte]accepted
}

type accepted struct {
	pod   attest.Pod
	until time.Time
}

func newRecent(lasts time.Duration) recent {
	return recent{lasts: lasts, known: map[[sha256.Size]byte]accepted{}}
}

func (r *recent) get(sum [sha256.Size]byte, now time.Time) (attest.Pod, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a, ok := r.known[sum]
	if !ok || !now.Before(a.until) {
		return attest.Pod{}, false
	}
	return a.pod, true
}

// put remembers a token until the time is over or the token is. When all room is taken by what is still good it is not remembered: the API server
// is asked again.
func (r *recent) put(sum [sha256.Size]byte, pod attest.Pod, now, expires time.Time) {
	until := now.Add(r.lasts)
	if expires.Before(until) {
		until = expires
	}
	if !now.Before(until) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.known) >= mostRecent {
		for s, a := range r.known {
			if !now.Before(a.until) {
				delete(r.known, s)
			}
		}
	}
	if len(r.known) < mostRecent {
		r.known[sum] = accepted{pod, until}
	}
}
