package e2e

import (
	"testing"
	"time"

	"github.com/google/nftables"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/test/hammer"
)

// TestSidecarsDie kills Envoys and agents, of servers and of clients, with the control plane there and gone, while everybody tries to get
// in: nobody is admitted who must not be, who may is admitted again as soon as the sidecar is back, and the kernel's rules are those
// of before.
func TestSidecarsDie(t *testing.T) {
	c := hammer.NewContest(random(t))
	m := manifests(t, hammer.Contested)
	m.Objects.NetworkPolicies = c.Policies()
	s := start(t, m, matrix.Options{})
	siege := enter(t, s, m)
	enough := func() {
		t.Helper()
		if err := siege.Await(t.Context(), 100); err != nil {
			t.Fatal(err)
		}
	}
	enough()
	rules := map[string]int{}
	for _, name := range []string{"shop/s1", "shop/always", "shop/never"} {
		rules[name] = rulesOf(t, s, name)
	}
	for _, name := range []string{"shop/s1", "shop/always", "shop/never"} {
		killEnvoy(t, s, siege, name)
		enough()
		killAgent(t, s, siege, name)
		enough()
		if got := rulesOf(t, s, name); got != rules[name] {
			t.Errorf("%s has %d nftables rules after its agent came back, %d before", name, got, rules[name])
		}
	}

	// The agents know the last good configuration: no control plane is needed.
	s.StopControlPlane()
	for _, name := range []string{"shop/s1", "shop/always"} {
		killEnvoy(t, s, siege, name)
		enough()
	}
	restart(t, s)
	enough()
	lift(t, siege)
}

// killEnvoy kills a pod's Envoy and returns when the next one is ready.
func killEnvoy(t *testing.T, s *sandbox.Sandbox, g *hammer.Arena, name string) {
	t.Helper()
	began := time.Now()
	dead, err := s.KillEnvoy(name)
	if err != nil {
		t.Fatal(err)
	}
	await(t, "another Envoy of "+name, func() bool {
		sc, err := s.Sidecar(name)
		if err != nil {
			t.Fatal(err)
		}
		return sc.Envoy != 0 && sc.Envoy != dead
	})
	back(t, s, g, name, "Envoy", began)
}

// killAgent kills a pod's agent, starts another one a while later and returns when that is ready.
func killAgent(t *testing.T, s *sandbox.Sandbox, g *hammer.Arena, name string) {
	t.Helper()
	began := time.Now()
	if err := s.KillAgent(name); err != nil {
		t.Fatal(err)
	}
	if err := g.Await(t.Context(), 50); err != nil { // nothing of the sidecar is there
		t.Fatal(err)
	}
	if err := s.StartAgent(name); err != nil {
		t.Fatal(err)
	}
	back(t, s, g, name, "agent", began)
}

// back waits until a sidecar is ready again; what failed between is excused.
func back(t *testing.T, s *sandbox.Sandbox, g *hammer.Arena, name, what string, began time.Time) {
	t.Helper()
	if err := s.AwaitReady(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	g.Excuse(name, began, time.Now())
	t.Logf("the %s of %s was killed; ready again after %s", what, name, time.Since(began).Round(time.Millisecond))
}

// rulesOf counts the nftables rules of a pod, those of the sandbox included.
func rulesOf(t *testing.T, s *sandbox.Sandbox, name string) (n int) {
	t.Helper()
	err := pod(t, s, name).Do(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		chains, err := conn.ListChains()
		if err != nil {
			return err
		}
		for _, c := range chains {
			rules, err := conn.GetRules(c.Table, c)
			if err != nil {
				return err
			}
			n += 1 + len(rules)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n == 0 {
		t.Fatalf("%s has no rules at all", name)
	}
	return n
}
