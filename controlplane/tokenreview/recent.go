package tokenreview

import (
	"crypto/sha256"
	"sync"
	"time"

	"github.com/mantlet/mantlet/identity/attest"
)

// mostRecent bounds what is remembered: about 1 MB.
const mostRecent = 10_000

// recent remembers for a moment what was said of tokens, by their hash.
type recent struct {
	lasts time.Duration

	mu    sync.Mutex
	known map[[sha256.Size]byte]reviewed
}

// reviewed is what a review said: a pod, or why the token is refused.
type reviewed struct {
	pod   attest.Pod
	err   error
	until time.Time
}

func newRecent(lasts time.Duration) recent {
	return recent{lasts: lasts, known: map[[sha256.Size]byte]reviewed{}}
}

func (r *recent) get(sum [sha256.Size]byte, now time.Time) (reviewed, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a, ok := r.known[sum]
	if !ok || !now.Before(a.until) {
		return reviewed{}, false
	}
	return a, true
}

// put remembers it until the time is over or what is said. When all room is taken by what is still good it is not remembered: the API server
// is asked again.
func (r *recent) put(sum [sha256.Size]byte, is reviewed, now, expires time.Time) {
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
		is.until = until
		r.known[sum] = is
	}
}
