package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"

	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/revoke"
	"github.com/mantlet/mantlet/agent/verdicts"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Shut closes the pod whose network namespace the calling thread is in, for node mode: every connection of its apps and of its sidecar, and every
// datagram, is refused or dropped until [Enforce] is told better. What is there of an earlier Enforce stays.
func Shut(logger *slog.Logger) error {
	l, _, err := shutNode(logger)
	if err == nil {
		l.close()
	}
	return err
}

// shutNode closes the pod and returns what keeps it so, and whom that exempts: the user of the pod's sidecar, once an earlier Enforce has met it; nil:
// nobody.
func shutNode(logger *slog.Logger) (*local, *proxyuser.User, error) {
	user, err := netfilter.Exempted()
	if err != nil {
		return nil, nil, err
	}
	if user != nil && !proxyuser.Pod.Has(*user) {
		user = nil
	}
	rules, held := nodeRules(user)
	redirect, err := netfilter.New(rules, logger)
	if err != nil {
		return nil, nil, err
	}
	if err := shut(held); err != nil {
		return nil, nil, err
	}
	if redirect.Check() != nil {
		if err := redirect.Apply(); err != nil {
			return nil, nil, err
		}
	}
	packets, err := adoptPackets(logger)
	if err != nil {
		return nil, nil, err
	}
	return &local{redirect: redirect, packets: packets, logger: logger}, user, nil
}

// nodeRules are the configurations that exempt a pod's sidecar; nil: nobody, as long as it is not known.
func nodeRules(user *proxyuser.User) (netfilter.Config, hold.Config) {
	held := hold.Defaults()
	if user == nil {
		return netfilter.ByMark(), held
	}
	held.Users = []proxyuser.User{*user}
	return netfilter.ByNode(*user), held
}

// exempt lets a sidecar's user pass, which nobody was let before. The redirect comes last: whom it exempts all do.
func (l *local) exempt(user proxyuser.User) error {
	rules, held := nodeRules(&user)
	redirect, err := netfilter.New(rules, l.logger)
	if err != nil {
		return err
	}
	if err := hold.Shut(held); err != nil {
		return err
	}
	if err := redirect.Apply(); err != nil {
		return err
	}
	l.redirect.Close()
	l.redirect = redirect
	return nil
}

// Enforce does in the pod's network namespace, which is that of the process, what the pod's agent may not: from a connection to that agent
// (its NodeSocket) until that ends (nil) or ctx does (nil), or something fails. Whatever happens the pod stays as it is then: the next Enforce begins with that, and
// what it knows of destinations anew. dial is asked once the pod is closed, and says who listens there: that user is exempt from then on, in the pod as long
// as there is the pod, and no other will be.
//
// What the agent says is taken for hostile: it can bring about nothing that its own pod's sidecar could not, it is bounded, and what is out of
// order ends the link.
func Enforce(ctx context.Context, dial func(context.Context) (net.Conn, proxyuser.User, error), logger *slog.Logger) error {
	l, known, err := shutNode(logger)
	if err != nil {
		return err
	}
	defer l.close()
	var ports held
	defer func() { ports.close() }()
	if known != nil { // apps run, perhaps, and the agent is perhaps not there
		if ports, err = holdPorts(*known, names.InboundPort, names.OutboundPort); err != nil {
			return fmt.Errorf("for the pod's sidecar, %s so far: %w", *known, err)
		}
	}
	conn, user, err := dial(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer conn.Close()
	if known == nil {
		if ports, err = holdPorts(user, names.InboundPort, names.OutboundPort); err == nil {
			err = l.exempt(user)
		}
	} else {
		err = sameUser(*known, user)
	}
	if err != nil {
		return err
	}
	sockets, err := revoke.OpenDestroyer(revoke.ByUser(user.UID))
	if err != nil {
		return err
	}
	defer sockets.Close()
	logger.Info("node: the pod's agent is there", "as", user.String())
	e := newEnforcer(conn, l, sockets.Destroy)
	_, cfg := nodeRules(&user)
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
