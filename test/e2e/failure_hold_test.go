package e2e

import (
	"context"
	"maps"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// TestAgentDiesHoldingSYNs kills an agent while connections of its pod's app are held, because the control plane hangs, and brings it back, once
// before the control plane goes on and once after. What is asked about waits meanwhile, admitted by nobody; in the end each of those connections
// gets its answer; then everything is as before, the kernel's rules too.
func TestAgentDiesHoldingSYNs(t *testing.T) {
	s := startHonest(t)
	t.Run("back while the control plane hangs", func(t *testing.T) { dieHolding(t, s, true) })
	t.Run("back when the control plane goes on", func(t *testing.T) { dieHolding(t, s, false) })
}

// dieHolding does it once, in honest with web. hangs: the control plane goes on only once the next agent is there.
func dieHolding(t *testing.T, s *sandbox.Sandbox, hangs bool) { //nolint:revive // the same steps in another order
	web, api, db := pod(t, s, "shop/web"), pod(t, s, "shop/api"), pod(t, s, "shop/db")
	rules := rulesetOf(t, web)
	inside, others := honestVerdicts(t, s)
	stop := besiegeOutside(t, web)

	var thaw func()
	var held []*dialling
	for tries := 1; ; tries++ {
		startAnew(t, s, "shop/web") // it knows no destination then
		thaw = s.FreezeControlPlane()
		t.Cleanup(thaw)
		d := dialAll(t, web, inside)
		within(hold.Defaults().Patience, func() bool { // after which the hold refuses what it cannot ask about
			unread, _, there := logSocket(t, web)
			return d.waiting(t, web, 0) && there && unread == 0
		})
		if err := s.KillAgent("shop/web"); err != nil {
			t.Fatal(err)
		}
		if d.waiting(t, web, 0) {
			held = append(held, d)
			break
		}
		thaw()
		if err := s.StartAgent("shop/web"); err != nil {
			t.Fatal(err)
		}
		d.judge(t) // refused by the agent just before its end
		if tries == 5 || t.Failed() {
			t.Fatalf("%d times connections were not held until the agent's end", tries)
		}
	}
	before := []int{accepted(t, api, echo), accepted(t, db, echo)}
	closed := func(when string, begun *dialling) {
		t.Helper()
		await(t, "TCP to ask again, "+when, func() bool { return begun.waiting(t, web, 1) })
		if got := []int{accepted(t, api, echo), accepted(t, db, echo)}; got[0] != before[0] || got[1] != before[1] {
			t.Errorf("%s: api and db have accepted %d connections, %d before", when, got, before)
		}
		for to := range outsideOf(others) {
			connectSays(t, web, when, to, false)
		}
	}
	d := dialAll(t, web, inside)
	held = append(held, d)
	closed("without an agent", d)

	if !hangs {
		thaw()
	}
	if err := s.StartAgent("shop/web"); err != nil {
		t.Fatal(err)
	}
	if hangs {
		await(t, "the next Envoy", func() bool {
			sc, err := s.Sidecar("shop/web")
			if err != nil {
				t.Fatal(err)
			}
			return sc.Envoy != 0
		})
		d := dialAll(t, web, inside)
		held = append(held, d)
		closed("with an agent that the control plane does not answer", d)
		short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := s.AwaitReady(short, "shop/web"); err == nil {
			t.Error("ready without any policy")
		}
		thaw()
	}
	if err := s.AwaitReady(t.Context(), "shop/web"); err != nil {
		t.Fatal(err)
	}
	for _, list := range []map[string]bool{inside, others} {
		for to, allowed := range list {
			connectSays(t, web, "with the next agent", to, allowed)
		}
	}
	for _, d := range held {
		d.judge(t)
	}
	stop()
	if got := accepted(t, db, echo); got != before[1] {
		t.Errorf("db has accepted %d connections", got-before[1])
	}
	wantRuleset(t, web, rules)
}

// outsideOf are those destinations of honest that are outside the cluster.
func outsideOf(to map[string]bool) map[string]bool {
	v4, v6 := netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8:1::/64")
	out := maps.Clone(to)
	maps.DeleteFunc(out, func(to string, _ bool) bool {
		a := netip.MustParseAddrPort(to).Addr()
		return !v4.Contains(a) && !v6.Contains(a)
	})
	return out
}

// judge wants denied connections that were held to be refused, and allowed ones to have got through, or refused where they came before the sidecar
// was ready.
func (d *dialling) judge(t *testing.T) {
	t.Helper()
	n := 0
	for _, o := range d.wait() {
		n++
		switch allowed := d.to[o.Target.Addr]; {
		case allowed && o.Reached != "" && o.Err == "":
		case o.Connect != netns.Refused || o.Bytes != 0 || o.Reached != "":
			t.Errorf("%s, allowed %t: connect() says %q after %s; answered by %q (%s)", o.Target.Addr, allowed, o.Connect, o.Elapsed, o.Reached, o.Err)
		}
	}
	if n != len(d.to) {
		t.Errorf("%d of %d connections have ended", n, len(d.to))
	}
}

// startAnew kills a pod's agent and waits until the next one is ready.
func startAnew(t *testing.T, s *sandbox.Sandbox, name string) {
	t.Helper()
	if err := s.KillAgent(name); err != nil {
		t.Fatal(err)
	}
	if err := s.StartAgent(name); err != nil {
		t.Fatal(err)
	}
	if err := s.AwaitReady(t.Context(), name); err != nil {
		t.Fatal(err)
	}
}

// besiegeOutside has web in honest try without pause, until stop, to get out to where somebody answers and policy does not let it.
func besiegeOutside(t *testing.T, web *netns.Pod) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	tried := 0
	running.Go(func() {
		if err := web.Do(func() error {
			for ; ctx.Err() == nil; tried++ {
				to := []string{"198.51.100.200:443", "[2001:db8:1:0:8000::7]:443", "203.0.113.9:443"}[tried%3]
				c, err := net.DialTimeout("tcp", to, patience)
				if err == nil {
					c.Close()
					t.Errorf("%s: connected", to)
				}
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	})
	stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		if tried < 20 {
			t.Errorf("tried only %d times to get out", tried)
		}
	})
	t.Cleanup(stop)
	return stop
}

// within waits until something is so, not longer than a time.
func within(patience time.Duration, ok func() bool) {
	for deadline := time.After(patience); !ok(); {
		select {
		case <-deadline:
			return
		case <-time.After(5 * time.Millisecond):
		}
	}
}
