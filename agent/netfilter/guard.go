package netfilter

import (
	"context"
	"fmt"
	"time"

	"github.com/google/nftables"
)

// Guard watches the table until ctx ends: whenever any nftables transaction of the network namespace commits, the table is checked
// and, where it is not as Apply writes it, reported as an error and written again. It returns nil when ctx ended and an error where
// it cannot watch or repair; the pod must then not count as enforced.
//
// Whoever can change the table has CAP_NET_ADMIN in the pod and could do worse; Guard is against mistakes (a flush by hand,
// another tool), not against them.
func (r *Redirect) Guard(ctx context.Context) error {
	for {
		lost, err := r.watch(ctx)
		if err != nil || ctx.Err() != nil {
			return err
		}
		r.logger.Warn("redirect: lost track of nftables changes, watching anew", "cause", lost)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond): // a burst of changes that overflows the socket is still going on
		}
	}
}

// watch repairs on every change until ctx ends (nil, nil), the events stop coming (lost) or a repair fails (err).
func (r *Redirect) watch(ctx context.Context) (lost, err error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("redirect: open nftables: %w", err)
	}
	monitor := nftables.NewMonitor()
	events, err := conn.AddGenerationalMonitor(monitor)
	if err != nil {
		_ = conn.CloseLasting()
		return nil, fmt.Errorf("redirect: watch nftables: %w", err)
	}
	defer func() {
		_ = conn.CloseLasting()
		for range events { // the monitor ends by closing the channel, and may be sending to it
		}
	}()
	if err := r.repair(); err != nil { // what happened before the watch began
		return nil, err
	}
	for {
		select {
		case <-ctx.Done():
			return nil, nil
		case batch, ok := <-events:
			if !ok {
				return fmt.Errorf("the kernel closed the event stream"), nil
			}
			if batch.GeneratedBy.Type == nftables.MonitorEventTypeOOB {
				return batch.GeneratedBy.Error, nil
			}
			if err := r.repair(); err != nil {
				return nil, err
			}
		}
	}
}

// repair writes the table again if it is not as it should be.
func (r *Redirect) repair() error {
	broken := r.Check()
	if broken == nil {
		return nil
	}
	r.logger.Error("redirect: somebody changed the pod's redirect; writing it again", "found", broken)
	if err := r.Apply(); err != nil {
		return err
	}
	if err := r.Check(); err != nil {
		return err
	}
	r.logger.Warn("redirect: the pod's redirect is in place again")
	return nil
}
