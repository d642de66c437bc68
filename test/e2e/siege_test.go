package e2e

import (
	"testing"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/test/hammer"
)

// enter has everybody try the contested servers until lift.
func enter(t *testing.T, s *sandbox.Sandbox, m *source.Manifests) *hammer.Arena {
	t.Helper()
	a, err := hammer.Enter(s, m, policy.Config{TrustDomain: trustDomain, PodNetwork: m.PodNetwork})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.Close)
	return a
}

// lift ends a siege and fails the test for whatever went wrong.
func lift(t *testing.T, a *hammer.Arena) *hammer.Tally {
	t.Helper()
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	tally := a.Judge()
	t.Log(tally)
	for _, c := range tally.Complaints {
		t.Error(c)
	}
	return tally
}
