package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// step is one kind of traffic that each round makes through every variant.
type step struct {
	name   string
	kind   string
	atOnce int
	most   int  // connections at most: a closed one keeps its port for a minute
	costs  bool // CPU time per connection is taken here
}

// steps are made one after the other, each by all variants before the next: what is compared lies close together in time.
var steps = []step{
	{name: "connect", kind: kindConnect, atOnce: 1, most: 500},
	{name: "rate", kind: kindConnect, atOnce: 16, most: 2000, costs: true},
	{name: "request", kind: kindRequest, atOnce: 1},
	{name: "bulk-1", kind: kindBulk, atOnce: 1},
	{name: "bulk-8", kind: kindBulk, atOnce: 8},
}

// chooseSteps picks kinds of traffic by name, in their own order; "" is all.
func chooseSteps(list string) ([]step, error) {
	if list == "" {
		return steps, nil
	}
	var out []step
	var known []string
	wanted := strings.Split(list, ",")
	for _, s := range steps {
		known = append(known, s.name)
		if slices.Contains(wanted, s.name) {
			out = append(out, s)
		}
	}
	for _, w := range wanted {
		if !slices.Contains(known, w) {
			return nil, fmt.Errorf("-traffic: there is no %q\n  hint: there are %s", w, strings.Join(known, ", "))
		}
	}
	return out, nil
}

// patience is how long one connection may take on a busy machine.
const patience = 30 * time.Second

// round is the figures of a variant in one round, by metric.
type round map[string]float64

// measurement is what all rounds gave, in the order of the variants.
type measurement struct {
	rounds [][]round // by variant, by round
	rest   []resting // by variant
}

// resting is what was read once, at the end.
type resting struct {
	Envoy   memory  `json:"envoy"` // of both ends together
	Agent   memory  `json:"agent"`
	Resumed float64 `json:"resumed"` // of the server's TLS sessions, from 0 to 1
}

// measure makes one round that does not count, which opens sessions and on-demand clusters, and then those that do.
func (w *world) measure(ctx context.Context, rounds int, each time.Duration, traffic []step, progress func(done, of int)) (*measurement, error) {
	m := &measurement{rounds: make([][]round, len(w.lanes))}
	order := make([]int, len(w.lanes))
	for i := range order {
		order[i] = i
	}
	for n := range rounds + 1 {
		got := make([]round, len(w.lanes))
		for i := range got {
			got[i] = round{}
		}
		for _, s := range traffic {
			for _, i := range order {
				if err := ctx.Err(); err != nil {
					return nil, err
				}
				if err := w.lanes[i].take(ctx, s, each, got[i]); err != nil {
					return nil, fmt.Errorf("%s, %s: %w", w.lanes[i].name, s.name, err)
				}
			}
		}
		if n > 0 {
			for i := range got {
				m.rounds[i] = append(m.rounds[i], got[i])
			}
		}
		slices.Reverse(order)
		progress(n, rounds)
	}
	for _, l := range w.lanes {
		r, err := l.rest(ctx)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.name, err)
		}
		m.rest = append(m.rest, r)
	}
	return m, nil
}

// take makes one step and writes its figures down.
func (l *lane) take(ctx context.Context, s step, each time.Duration, into round) error {
	port := uint16(portEcho)
	if s.kind == kindBulk {
		port = portSink
	}
	before, err := l.spent()
	if err != nil {
		return err
	}
	got, err := l.client.do(order{Kind: s.kind, To: netip.AddrPortFrom(l.to, port), AtOnce: s.atOnce, For: each, Most: s.most, Patient: patience})
	if err != nil {
		return err
	}
	after, err := l.settled(ctx)
	if err != nil {
		return err
	}
	cost := after.minus(before)
	micros := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
	switch {
	case s.kind == kindBulk:
		into[s.name] = float64(got.Bytes) / 1e6 / got.Elapsed.Seconds()
		into[s.name+"-cpu"] = (cost.envoy + cost.agent).Seconds() * 1000 / (float64(got.Bytes) / 1e9)
	case s.costs:
		into[s.name] = float64(got.Count) / got.Elapsed.Seconds()
		into["envoy-cpu"] = micros(cost.envoy) / float64(got.Count)
		into["agent-cpu"] = micros(cost.agent) / float64(got.Count)
		into["cpu"] = into["envoy-cpu"] + into["agent-cpu"]
	default:
		into[s.name+"-p50"], into[s.name+"-p99"] = micros(got.P50), micros(got.P99)
	}
	return nil
}

func (l *lane) spent() (sum spent, err error) {
	for _, p := range l.proxies {
		s, err := p.spent()
		if err != nil {
			return sum, err
		}
		sum.envoy += s.envoy
		sum.agent += s.agent
	}
	return sum, nil
}

// What settled goes by: proxies have come to rest when they use less than 1 % of a CPU. Envoy sends access logs up to 100 ms after a
// connection's end, so that rest must last longer than that.
const (
	restLasts = 150 * time.Millisecond
	restUses  = restLasts / 100
	restWait  = 3 * time.Second
)

// settled waits until the proxies have done what the traffic has left them to do, and returns what they had spent by then.
func (l *lane) settled(ctx context.Context) (spent, error) {
	is, err := l.spent()
	if err != nil || len(l.proxies) == 0 {
		return is, err
	}
	for began := time.Now(); time.Since(began) < restWait; {
		select {
		case <-time.After(restLasts):
		case <-ctx.Done():
			return is, ctx.Err()
		}
		was := is
		if is, err = l.spent(); err != nil {
			return is, err
		}
		if more := is.minus(was); more.envoy+more.agent < restUses {
			break
		}
	}
	return is, nil
}

func (l *lane) rest(ctx context.Context) (r resting, err error) {
	for i, p := range l.proxies {
		m, err := memoryOf(p.envoy)
		if err != nil {
			return r, err
		}
		r.Envoy.Resident, r.Envoy.Private = r.Envoy.Resident+m.Resident, r.Envoy.Private+m.Private
		if p.agent != 0 {
			if m, err = memoryOf(p.agent); err != nil {
				return r, err
			}
			r.Agent.Resident, r.Agent.Private = r.Agent.Resident+m.Resident, r.Agent.Private+m.Private
		}
		if i == 0 {
			continue
		}
		all, resumed, err := p.handshakes(ctx)
		if err != nil {
			return r, err
		}
		if all > 0 {
			r.Resumed = float64(resumed) / float64(all)
		}
	}
	return r, nil
}
