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
// edit nor those after it allow never gets through, and what both allow never fails.
func TestNoGap(t *testing.T) {
	const edits = 200
	r := hammer.NewContest(random(t))
	m := manifests(t, hammer.Contested)
	m.Objects.NetworkPolicies = r.Policies()
	s := start(t, m, matrix.Options{})

	siege := enter(t, s, m)
	began := time.Now()
	var took []time.Duration
	for range edits {
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
	}
	tally := lift(t, siege)
	slices.Sort(took)
	t.Logf("%d edits in %s, in force after %s (median), %s (p99)", edits, time.Since(began).Round(time.Millisecond),
		took[edits/2].Round(time.Microsecond), took[edits*99/100].Round(time.Microsecond))
	if tally.Denied < 1000 || tally.Allowed < 500 {
		t.Errorf("too little was tried to prove anything: %s", tally)
	}
}
