package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/mantlet/mantlet/identity/ca"
)

// patience bounds how long a run may take: past it something is lost.
const patience = 3 * time.Minute

// bench is a cluster that is measured: the control plane's process and the sidecars.
type bench struct {
	ctx       context.Context
	shape     string
	n         int
	profile   string // folder; "": none
	world     *world
	changed   change // since the shape's own objects
	authority *ca.CA
	api       *apiServer // nil: objects are handed over directly
	plane     *process
	address   string
	fleet     map[string]*simulated
	want      map[string]versions
	loaded    sample // how the control plane took the objects over, with nobody connected
}

func newBench(ctx context.Context, o options) (*bench, error) {
	b := &bench{ctx: ctx, shape: o.shape, n: o.n, profile: o.profile, fleet: map[string]*simulated{}}
	var err error
	if b.world, err = newWorld(o.shape, o.n); err != nil {
		return nil, err
	}
	if b.authority, err = ca.New(ca.Config{TrustDomain: trustDomain}); err != nil {
		return nil, err
	}
	if b.want, err = expected(b.world); err != nil {
		return nil, err
	}
	if o.source == sourceAPI {
		if b.api, err = startAPIServer(ctx); err != nil {
			return nil, err
		}
		if err := b.api.load(ctx, b.world); err != nil {
			return nil, errors.Join(err, b.api.Stop())
		}
	}
	if err := b.start("127.0.0.1:0"); err != nil {
		return nil, errors.Join(err, b.stopAPIServer())
	}
	h := b.plane.hello
	b.loaded = sample{Workload: "load", Last: ms(h.Load), ServerCPU: ms(h.LoadCPU), allocs: h.Figures.Allocs, allocated: h.Figures.Allocated}
	return b, b.count(&b.loaded)
}

// start starts a control plane, with the objects that there are now.
func (b *bench) start(listen string) error {
	material, err := b.authority.Material()
	if err != nil {
		return err
	}
	history, err := parcels(b.changed)
	if err != nil {
		return err
	}
	c := planeConfig{Shape: b.shape, N: b.n, Listen: listen, CA: material, History: history, Profile: b.profile}
	if b.api != nil {
		c.Kubeconfig, c.History = b.api.Kubeconfig(), nil
	}
	if b.plane, err = startPlane(c); err != nil {
		return err
	}
	b.address = b.plane.hello.Address
	return nil
}

// attesting is how many sidecars at most get their SVIDs at a time: it is not what is measured, and ten thousand at once would only meet again,
// after their time limits.
const attesting = 200

// attest gets sidecars their SVIDs, before they connect.
func (b *bench) attest(pods []sidecarPod) error {
	for len(pods) > attesting {
		if err := b.attest(pods[:attesting]); err != nil {
			return err
		}
		pods = pods[attesting:]
	}
	for _, pod := range pods {
		s, err := newSimulated(pod, b.address, b.authority.Bundle())
		if err != nil {
			return err
		}
		s.attest(b.ctx)
		b.fleet[pod.key()] = s
	}
	deadline := time.After(patience)
	for _, pod := range pods {
		select {
		case <-b.fleet[pod.key()].source.Ready():
		case <-b.ctx.Done():
			return b.ctx.Err()
		case <-deadline:
			return fmt.Errorf("%s has no SVID after %s", pod.key(), patience)
		}
	}
	return nil
}

// expectAll has sidecars say when they hold something, and forgets what was counted so far of all.
func (b *bench) expectAll(concerned map[string]versions) <-chan arrival {
	arrivals := make(chan arrival, len(concerned))
	for name, s := range b.fleet {
		s.expect(concerned[name], arrivals)
	}
	return arrivals
}

// await waits until all have said so.
func (b *bench) await(arrivals <-chan arrival, n int) ([]time.Duration, error) {
	var out []time.Duration
	deadline := time.After(patience)
	for len(out) < n {
		select {
		case a := <-arrivals:
			out = append(out, a.when)
		case <-b.ctx.Done():
			return nil, b.ctx.Err()
		case <-deadline:
			return nil, fmt.Errorf("%d of %d sidecars do not hold what they should after %s", n-len(out), n, patience)
		}
	}
	slices.Sort(out)
	return out, nil
}

// settle waits until nothing is on its way any more, and returns what the control plane has used and sent so far.
func (b *bench) settle() (figures, error) {
	r, err := b.plane.do(command{Op: "settle"})
	return r.Figures, err
}

// verify holds every sidecar against what it must hold.
func (b *bench) verify() error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(b.fleet)) {
		if wrong := b.fleet[name].wrong(b.want[name]); len(wrong) > 0 {
			errs = append(errs, fmt.Errorf("%s holds wrong versions of %v", name, wrong))
		}
		if len(errs) > 5 {
			break
		}
	}
	return errors.Join(errs...)
}

func (b *bench) close() error {
	for _, s := range b.fleet {
		s.stop()
	}
	for _, s := range b.fleet {
		s.close()
	}
	return errors.Join(b.plane.stop(), b.stopAPIServer())
}

func (b *bench) stopAPIServer() error {
	if b.api == nil {
		return nil
	}
	return b.api.Stop()
}
