package e2e

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/test/hammer"
)

// random returns a source of randomness; -seed gives another one.
func random(t testing.TB) *rand.Rand {
	t.Helper()
	t.Logf("to repeat: -seed %d", *seed)
	return rand.New(rand.NewPCG(*seed, 0)) //nolint:gosec // not for secrets
}

// TestNoGap hammers two servers while their policies, and those of their clients, change 200 times: what neither the policies before an
// edit nor those after it allow never gets through, and what both allow never fails. Most edits follow each other faster than policy settles, so that
// an attempt is held against many states at once and those whose policies change could mostly be either; every fourth has policy at rest before it and
// after it, and what is tried meanwhile is held against exactly the old state and the new one.
func TestNoGap(t *testing.T) {
	const edits, alone, deniedAtLeast = 200, 4, 200
	changing := []string{"shop/a", "legacy/plain"}
	r := hammer.NewContest(random(t))
	m := manifests(t, hammer.Contested)
	m.Objects.NetworkPolicies = r.Policies()
	s := start(t, m, matrix.Options{})

	siege := enter(t, s, m)
	began := time.Now()
	var took []time.Duration
	rest := func() {
		t.Helper()
		for _, peer := range changing {
			if err := siege.AwaitSettled(t.Context(), peer, siege.Targets); err != nil {
				t.Fatal(err)
			}
		}
	}
	for i := range edits {
		if i%alone == 0 && i > 0 {
			rest()
		}
		r.Edit()
		next := *m
		next.Objects.NetworkPolicies = r.Policies()
		allows, err := siege.Allows(&next)
		if err != nil {
			t.Fatal(err)
		}
		siege.History.Begin(allows)
		c, err := s.Update(t.Context(), &next)
		if err != nil {
			t.Fatal(err)
		}
		siege.History.Confirm()
		took = append(took, c.InForce)
		if err := siege.Await(t.Context(), 12); err != nil {
			t.Fatal(err)
		}
		if i%alone == 0 {
			rest()
		}
	}
	tally := lift(t, siege)
	slices.Sort(took)
	t.Logf("%d edits in %s, in force after %s (median), %s (p99)", edits, time.Since(began).Round(time.Millisecond),
		took[edits/2].Round(time.Microsecond), took[edits*99/100].Round(time.Microsecond))
	t.Log(tally.Windows)
	for _, peer := range changing {
		if n := tally.Windows[peer][2].Denied; n < deniedAtLeast {
			t.Errorf("%s: only %d attempts were held against exactly the states before and after an edit and had to be denied, want %d", peer, n, deniedAtLeast)
		}
	}
	if tally.Denied < 1000 || tally.Allowed < 500 {
		t.Errorf("too little was tried to prove anything: %s", tally)
	}
}
