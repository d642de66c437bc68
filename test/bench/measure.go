package main

import (
	"fmt"
	"runtime"
	"slices"
	"time"
)

// sample is one run, or the medians of several. The JSON keys are those of the benchmark's interface.
type sample struct {
	Workload  string  `json:"workload"`
	Sidecars  int     `json:"sidecars"`
	Affected  int     `json:"affected"`
	Pushed    int     `json:"pushed"`
	Bytes     int64   `json:"bytes"` // of responses as gRPC messages, compressed as they are
	First     float64 `json:"first_ms"`
	P50       float64 `json:"p50_ms"`
	P99       float64 `json:"p99_ms"`
	Last      float64 `json:"last_ms"`
	ServerCPU float64 `json:"server_cpu_ms"`
	ClientCPU float64 `json:"client_cpu_ms"`
	RSS       int64   `json:"rss_bytes"` // of the control plane, after the run

	pace

	allocs, allocated uint64 // by the control plane: how many, bytes
	mean              struct{ allocs, allocated uint64 }
}

// times enters when sidecars held what they should, as after a moment: the last write of a change. Who needed only what came before that
// waited for nothing.
func (s *sample) times(sorted []time.Duration, since time.Duration) {
	if len(sorted) == 0 {
		return
	}
	at := func(share float64) float64 { return max(ms(sorted[int(share*float64(len(sorted)-1))]-since), 0) }
	s.First, s.P50, s.P99, s.Last = at(0), at(0.5), at(0.99), at(1)
}

// used enters what processes have used between two moments.
func (s *sample) used(before, after figures, client time.Duration) {
	s.ServerCPU, s.ClientCPU = ms(after.CPU-before.CPU), ms(client)
	s.allocs, s.allocated = after.Allocs-before.Allocs, after.Allocated-before.Allocated
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// measure hands a change to the control plane and follows it to the last sidecar.
func (b *bench) measure(c change) (sample, error) {
	s := sample{Sidecars: len(b.fleet)}
	concerned, err := b.next(c)
	if err != nil {
		return s, err
	}
	write, err := b.prepare(c)
	if err != nil {
		return s, err
	}
	runtime.GC()
	err = b.followed(&s, concerned, write)
	return s, err
}

// followed writes, and follows that to the last sidecar of those that it concerns.
func (b *bench) followed(s *sample, concerned map[string]versions, write func() (time.Duration, error)) error {
	before, err := b.settle()
	if err != nil {
		return err
	}
	arrivals := b.expectAll(concerned)
	client := cpu()
	at, err := write()
	if err != nil {
		return err
	}
	times, err := b.await(arrivals, len(concerned))
	if err != nil {
		return err
	}
	client = cpu() - client
	after, err := b.settle()
	if err != nil {
		return err
	}
	s.Affected = len(concerned)
	s.times(times, at)
	s.used(before, after, client)
	return b.count(s)
}

// next makes a change here, and says what it means to the sidecars that there are.
func (b *bench) next(c change) (map[string]versions, error) {
	b.world.take(c)
	b.changed = append(b.changed, c...)
	next, err := expected(b.world)
	if err != nil {
		return nil, err
	}
	concerned := difference(b.want, next)
	for name := range concerned {
		if b.fleet[name] == nil { // its sidecar comes later
			delete(concerned, name)
		}
	}
	b.want = next
	return concerned, nil
}

// prepare returns what makes a change, and says when its last write had returned: in the control plane's process, where it is brought first, or
// at the API server.
func (b *bench) prepare(c change) (write func() (time.Duration, error), err error) {
	if b.api != nil {
		return func() (time.Duration, error) { return b.api.write(b.ctx, c) }, nil
	}
	steps, err := parcels(c)
	if err != nil {
		return nil, err
	}
	if _, err := b.plane.do(command{Op: "prepare", Steps: steps}); err != nil {
		return nil, err
	}
	return func() (time.Duration, error) {
		r, err := b.plane.do(command{Op: "write"})
		return r.At, err
	}, nil
}

// count enters what was sent, and the memory that the control plane has now.
func (b *bench) count(s *sample) error {
	r, err := b.plane.do(command{Op: "memory"})
	if err != nil {
		return err
	}
	s.RSS = r.RSS
	for _, sc := range b.fleet {
		pushes, bytes := sc.counts()
		if pushes > 0 {
			s.Pushed++
		}
		s.Bytes += bytes
	}
	return nil
}

// median takes the median of each figure.
func median(name string, runs []sample) (sample, error) {
	if len(runs) == 0 {
		return sample{}, fmt.Errorf("workload %s: nothing was measured", name)
	}
	out := sample{
		Workload: name, Sidecars: runs[0].Sidecars,
		Affected: mid(runs, func(s sample) int { return s.Affected }), Pushed: mid(runs, func(s sample) int { return s.Pushed }),
		Bytes: mid(runs, func(s sample) int64 { return s.Bytes }), RSS: mid(runs, func(s sample) int64 { return s.RSS }),
		First: mid(runs, func(s sample) float64 { return s.First }), P50: mid(runs, func(s sample) float64 { return s.P50 }),
		P99: mid(runs, func(s sample) float64 { return s.P99 }), Last: mid(runs, func(s sample) float64 { return s.Last }),
		ServerCPU: mid(runs, func(s sample) float64 { return s.ServerCPU }), ClientCPU: mid(runs, func(s sample) float64 { return s.ClientCPU }),
	}
	out.pace = runs[len(runs)-1].pace
	out.allocs = mid(runs, func(s sample) uint64 { return s.allocs })
	out.allocated = mid(runs, func(s sample) uint64 { return s.allocated })
	for _, s := range runs {
		out.mean.allocs += s.allocs
		out.mean.allocated += s.allocated
	}
	out.mean.allocs /= uint64(len(runs))
	out.mean.allocated /= uint64(len(runs))
	return out, nil
}

func mid[T int | int64 | uint64 | float64](runs []sample, of func(sample) T) T {
	var all []T
	for _, s := range runs {
		all = append(all, of(s))
	}
	slices.Sort(all)
	return all[len(all)/2]
}
