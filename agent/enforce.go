package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"

	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/revoke"
	"github.com/mantlet/mantlet/agent/verdicts"
	"github.com/mantlet/mantlet/xds/names"
)

// Shut closes the pod whose network namespace the calling thread is in, for node mode: every connection of its apps and every datagram is
// refused or dropped until [Enforce] is told better. What is there of an earlier Enforce stays.
func Shut(logger *slog.Logger) error {
	l, err := shutNode(logger)
	if err == nil {
		l.close()
	}
	return err
}

// shutNode closes the pod and returns what keeps it so.
func shutNode(logger *slog.Logger) (*local, error) {
	redirect, err := netfilter.New(netfilter.ByNode(), logger)
	if err != nil {
		return nil, err
	}
	if err := shut(hold.Defaults()); err != nil {
		return nil, err
	}
	if redirect.Check() != nil {
		if err := redirect.Apply(); err != nil {
			return nil, err
		}
	}
	packets, err := adoptPackets(logger)
	if err != nil {
		return nil, err
	}
	return &local{redirect: redirect, packets: packets, logger: logger}, nil
}

// Enforce does in the pod's network namespace, which is that of the process, what the pod's agent may not: from a connection to that agent
// (its NodeSocket) until that ends (nil) or ctx does (nil), or something fails. Whatever happens the pod stays as it is then: the next Enforce begins with that, and
// what it knows of destinations anew. dial is asked once the pod is closed.
//
// What the agent says is taken for hostile: it can bring about nothing that its own pod's sidecar could not, it is bounded, and what is out of
// order ends the link.
func Enforce(ctx context.Context, dial func(context.Context) (net.Conn, error), logger *slog.Logger) error {
	l, err := shutNode(logger)
	if err != nil {
		return err
	}
	defer l.close()
	ports, err := holdPorts(names.ProxyUID, names.InboundPort, names.OutboundPort)
	if err != nil {
		return err
	}
	defer ports.close()
	sockets, err := revoke.OpenDestroyer(revoke.ByUser(names.ProxyUID))
	if err != nil {
		return err
	}
	defer sockets.Close()
	conn, err := dial(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer conn.Close()
	logger.Info("node: the pod's agent is there")
	e := newEnforcer(conn, l, sockets.Destroy)
	cfg := hold.Defaults()
	cfg.Refused = e.refused
	l.hold = newSynHold(cfg, e, verdicts.New(), logger)
	parts, ctx := errgroup.WithContext(ctx)
	parts.Go(func() error { return l.run(ctx) })
	parts.Go(func() error { return e.serve(ctx) })
	if err := parts.Wait(); !errors.Is(err, errDetached) {
		return err
	}
	logger.Warn("node: the pod's agent has gone; the pod stays as it is until it is back")
	return nil
}

// errDetached ends an Enforce in good order.
var errDetached = errors.New("the pod's agent has gone")
