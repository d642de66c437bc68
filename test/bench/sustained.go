package main

import (
	"fmt"
	"slices"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	sustainedRate    = 100 // changes a second
	sustainedSeconds = 10
	sustainedEvery   = time.Second / sustainedRate
	backlogEvery     = 500 * time.Millisecond
)

// pace is how changes at a fixed rate went.
type pace struct {
	Writes int `json:"writes,omitempty"`
	// Late is how long after it was due a write had returned, in ms: the median, the worst, and the median of the last tenth, which is much more
	// than that of all where the control plane falls behind.
	LateP50  float64 `json:"late_p50_ms,omitempty"`
	LateMax  float64 `json:"late_max_ms,omitempty"`
	LateLast float64 `json:"late_last_ms,omitempty"`
	// Backlog counts the sidecars that had not confirmed all that they should hold, every half second while changes were made.
	Backlog []int `json:"backlog,omitempty"`
}

func (p pace) String() string {
	return fmt.Sprintf("%d writes, %d a second: returned %.1f ms after they were due (median; worst %.1f, median of the last tenth %.1f); sidecars behind, every %s: %v",
		p.Writes, sustainedRate, p.LateP50, p.LateMax, p.LateLast, backlogEvery, p.Backlog)
}

// sustained updates a policy of one service after another, a hundred times a second: each concerns ten sidecars, all get one each second. How soon
// is how long after the last write the last sidecar held what it must. Writes begin when they are due, whether those before have returned or not.
func sustained(b *bench, _ int) (sample, error) {
	s := sample{Sidecars: len(b.fleet)}
	services := b.world.services
	var c change
	for k := range sustainedRate * sustainedSeconds {
		i := k % len(services)
		c = append(c, step{applied: []metav1.Object{allowFrom(services[i], "paced", services[(i+2)%len(services)], 9000+int32(k/len(services)))}})
	}
	concerned, err := b.next(c)
	if err != nil {
		return s, err
	}
	err = b.followed(&s, concerned, func() (time.Duration, error) { return b.paced(c, &s) })
	return s, err
}

// paced writes a change at the fixed rate, and returns when the last write had returned.
func (b *bench) paced(c change, s *sample) (at time.Duration, err error) {
	if b.api == nil {
		steps, err := parcels(c)
		if err != nil {
			return 0, err
		}
		if _, err := b.plane.do(command{Op: "prepare", Steps: steps}); err != nil {
			return 0, err
		}
		r, err := b.plane.do(command{Op: "pace"})
		s.pace = r.Pace
		return r.At, err
	}
	s.pace, err = keepPace(c, func(st step) error {
		_, err := b.api.write(b.ctx, change{st})
		return err
	}, func() (int, error) {
		r, err := b.plane.do(command{Op: "backlog"})
		return r.Backlog, err
	})
	return clock(), err
}

// keepPace writes steps when they are due. A step waits for those before it that are about the same object, and for no other.
func keepPace(c change, write func(step) error, backlog func() (int, error)) (p pace, err error) {
	var mu sync.Mutex // guards err and late
	late := make([]time.Duration, len(c))
	fail := func(e error) {
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			err = e
		}
	}
	began := clock()
	look, done := time.NewTicker(backlogEvery), make(chan struct{})
	var looking, writing sync.WaitGroup
	looking.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-look.C:
			}
			n, err := backlog()
			if err != nil {
				fail(err)
				return
			}
			p.Backlog = append(p.Backlog, n)
		}
	})
	last := map[string]chan struct{}{} // closed when the last write of an object has returned
	for i, st := range c {
		due := time.Duration(i) * sustainedEvery
		if ahead := due - (clock() - began); ahead > 0 {
			<-time.After(ahead)
		}
		before, written := last[keyOf(st.applied[0])], make(chan struct{})
		last[keyOf(st.applied[0])] = written
		writing.Go(func() {
			defer close(written)
			if before != nil {
				<-before
			}
			if e := write(st); e != nil {
				fail(e)
			}
			mu.Lock()
			defer mu.Unlock()
			late[i] = clock() - began - due
		})
	}
	writing.Wait()
	look.Stop()
	close(done)
	looking.Wait()
	p.Writes = len(c)
	tenth := slices.Clone(late[len(late)*9/10:])
	slices.Sort(late)
	slices.Sort(tenth)
	p.LateP50, p.LateMax, p.LateLast = ms(late[len(late)/2]), ms(late[len(late)-1]), ms(tenth[len(tenth)/2])
	return p, err
}

// backlog counts the sidecars that are connected and have not confirmed all that they should hold.
func (p *plane) backlog() (n int) {
	for _, c := range p.Server().Ledger().Snapshot() {
		if c.Connected && !c.InForce {
			n++
		}
	}
	return n
}
