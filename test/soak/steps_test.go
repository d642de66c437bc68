package soak

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/test/hammer"
)

// step does one thing at random and lets the clients try for a while.
func (k *soak) step() {
	do := func(what string, f func()) {
		k.done[what]++
		k.note("%s", what)
		f()
		k.note("%s: done", what)
	}
	switch n := k.rand.IntN(100); {
	case n < 70:
		do("edits", k.edit)
	case n < 77:
		do("scalings", k.scale)
	case n < 85:
		do("Envoys killed", k.killEnvoy)
	case n < 90:
		do("agents killed", k.killAgent)
	case n < 95:
		do("control planes killed", k.killControlPlane)
	case n < 97:
		do("control planes frozen", k.freeze)
	default:
		do("matrices", k.try)
	}
	k.within(func(ctx context.Context) error { return k.arena.Await(ctx, 20) })
	k.judge()
}

// note writes down what happens.
func (k *soak) note(format string, args ...any) {
	k.steps = append(k.steps, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

func (k *soak) edit() {
	k.contest.Edit()
	k.update()
}

func (k *soak) scale() {
	k.replica = 1 + k.rand.IntN(3)
	k.update()
}

// update takes over what has changed and returns when it is in force.
func (k *soak) update() {
	k.m = k.read()
	allows, err := k.arena.Allows(k.m)
	if err != nil {
		k.t.Fatal(err)
	}
	k.arena.History.Begin(allows)
	k.within(func(ctx context.Context) error { _, err := k.s.Update(ctx, k.m); return err })
	k.arena.History.Confirm()
}

func (k *soak) anyMortal() string { return mortals[k.rand.IntN(len(mortals))] }

func (k *soak) killEnvoy() {
	name, began := k.anyMortal(), time.Now()
	pid, err := k.s.KillEnvoy(name)
	if err != nil {
		k.t.Fatal(err)
	}
	k.back(name, pid, began)
}

// back waits until a pod has another Envoy and is ready; what failed between is excused.
func (k *soak) back(name string, dead int, began time.Time) {
	k.within(func(ctx context.Context) error {
		for {
			sc, err := k.s.Sidecar(name)
			if err != nil {
				return err
			}
			if sc.Envoy != 0 && sc.Envoy != dead {
				break
			}
			select {
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
				return fmt.Errorf("no Envoy of %s came back: %w", name, ctx.Err())
			}
		}
		return k.s.AwaitReady(ctx, name)
	})
	k.arena.Excuse(name, began, time.Now())
	took := time.Since(began).Round(time.Millisecond)
	k.note("%s is back, after %s", name, took)
	if took > k.slowest {
		k.slowest, k.slow = took, fmt.Sprintf("%s was back only after %s\n%s", name, took, k.s.AgentLog(name))
	}
}

func (k *soak) killAgent() {
	name, began := k.anyMortal(), time.Now()
	if err := k.s.KillAgent(name); err != nil {
		k.t.Fatal(err)
	}
	k.within(func(ctx context.Context) error { return k.arena.Await(ctx, k.rand.IntN(40)) })
	if err := k.s.StartAgent(name); err != nil {
		k.t.Fatal(err)
	}
	k.back(name, 0, began)
}

// killControlPlane has the cluster do without for a while, in which policy may be edited and an Envoy die.
func (k *soak) killControlPlane() {
	k.know()
	k.s.StopControlPlane()
	k.within(func(ctx context.Context) error { return k.arena.Await(ctx, k.rand.IntN(200)) })
	name, dead, began := "", 0, time.Now()
	if k.rand.IntN(2) == 0 {
		name = k.anyMortal()
		var err error
		if dead, err = k.s.KillEnvoy(name); err != nil {
			k.t.Fatal(err)
		}
		k.within(func(ctx context.Context) error { return k.arena.Await(ctx, 50) })
	}
	if k.rand.IntN(2) == 0 {
		k.contest.Edit()
		k.m = k.read()
		k.within(func(ctx context.Context) error { _, err := k.s.Update(ctx, k.m); return err })
	}
	allows, err := k.arena.Allows(k.m)
	if err != nil {
		k.t.Fatal(err)
	}
	k.arena.History.Begin(allows)
	if err := k.s.StartControlPlane(k.ctx); err != nil {
		k.t.Fatal(err)
	}
	if name != "" {
		k.back(name, dead, began)
	}
	k.confirmed()
	k.arena.History.Confirm()
}

// know waits until everybody has tried all destinations, who has just been restarted, too: what is unknown is refused while there is no control plane, and
// where one that hangs has not answered in time, for up to two seconds more (hold.Config.ErrorTTL).
func (k *soak) know() {
	for _, peer := range hammer.Contestants {
		k.within(func(ctx context.Context) error { return k.arena.AwaitEach(ctx, peer, k.arena.Targets) })
	}
}

// freeze has the control plane hang for a while.
func (k *soak) freeze() {
	k.know()
	thaw := k.s.FreezeControlPlane()
	k.within(func(ctx context.Context) error { return k.arena.Await(ctx, k.rand.IntN(200)) })
	thaw()
	k.confirmed()
}

// confirmed waits until every sidecar has confirmed everything.
func (k *soak) confirmed() {
	k.within(func(ctx context.Context) error {
		ledger := k.s.ControlPlane().Server().Ledger()
		for _, c := range ledger.Snapshot() {
			if err := ledger.Wait(ctx, c.Client); err != nil {
				return err
			}
		}
		return nil
	})
}

// try has all pods try all declared ports and holds the packets against the evaluator, with evidence of who was authenticated.
func (k *soak) try() {
	attempts, err := matrix.Plan(k.m, matrix.Options{})
	if err != nil {
		k.t.Fatal(err)
	}
	attempts = slices.DeleteFunc(attempts, func(a matrix.Attempt) bool { // behind it is an app that is no probe server
		return a.Addr.Addr().String() == hammer.ContestedVIP
	})
	k.within(func(ctx context.Context) error {
		res, err := k.s.Try(ctx, attempts)
		if err != nil {
			return err
		}
		for _, c := range res.Report.Connections {
			if c.Mismatch != "" {
				k.t.Errorf("%s → %s (%s:%d): %s", c.From, c.To, c.Address, c.Port, c.Mismatch)
			}
		}
		return nil
	})
}
