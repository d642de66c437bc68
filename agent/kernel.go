package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"

	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/verdict/wire"
)

// kernel does what takes privileges in the pod's network namespace: redirect, SYN hold, packet policy. *local does it itself, *remote has the
// node's daemon do it.
type kernel interface {
	// The bytes are those of mantlet.v1.Network, Verdicts and Packets. nil: the kernel has what they say.
	applyNetwork(b []byte) error
	applyVerdicts(b []byte) error
	applyPackets(b []byte) error
	// flip puts new answers in force, for destinations that were asked about.
	flip(answers map[netip.AddrPort]relay.Verdict)
	// Check fails unless redirect and SYN hold are in place.
	Check() error
	decided // the packet policy
	// run keeps all of it at work until ctx ends (nil) or something fails that cannot be repaired.
	run(ctx context.Context) error
}

// local works in the network namespace of the process.
type local struct {
	redirect *netfilter.Redirect
	packets  *packets
	hold     *synHold
	logger   *slog.Logger
}

func (l *local) applyVerdicts(b []byte) error                  { return l.hold.applyVerdicts(b) }
func (l *local) applyPackets(b []byte) error                   { return l.packets.Apply(b) }
func (l *local) flip(answers map[netip.AddrPort]relay.Verdict) { l.hold.flip(answers) }
func (l *local) Missing() string                               { return l.packets.Missing() }
func (l *local) Changed() <-chan struct{}                      { return l.packets.Changed() }
func (l *local) Check() error                                  { return errors.Join(l.redirect.Check(), l.hold.Check()) }

// close closes what is open to the kernel, but for the hold, which run closes. What is in force stays.
func (l *local) close() {
	l.redirect.Close()
	l.packets.close()
}

// applyNetwork takes over a mantlet.v1.Network, for all who decide by it: first the redirect, so that the kernel has the node's addresses before
// the control plane hears that they are in force.
func (l *local) applyNetwork(b []byte) error {
	n, err := wire.UnmarshalNetwork(b)
	if err != nil {
		return err
	}
	if err := l.redirect.SetNode(&n); err != nil {
		return err
	}
	return l.hold.applyNetwork(b)
}

func (l *local) run(ctx context.Context) error {
	parts, ctx := errgroup.WithContext(ctx)
	parts.Go(func() error { return l.packets.run(ctx) })
	parts.Go(func() error { return netfilter.Guard(ctx, l.logger, l.redirect, l.packets, heldTable{l.hold}) })
	parts.Go(func() error { return l.hold.run(ctx) })
	return parts.Wait()
}
