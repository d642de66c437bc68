package agent

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/identity/svid"
	"github.com/mantlet/mantlet/xds/names"
)

// readiness knows whether the pod is enforced: everything that it takes is there at this moment.
type readiness struct {
	tables    []table // in the kernel
	source    svid.Source
	ledger    ledger
	verdicts  decided
	packets   decided
	identity  func() (missing string, changed <-chan struct{}) // why the certificate that Envoy shows is not the pod's, or ""
	trouble   func() string                                    // why the control plane gives no configuration, or ""
	envoy     *peer
	stopping  <-chan struct{}
	beginning *beginning
}

// decided is what the agent itself decides by; *verdicts.Holder and *packets are.
type decided interface {
	Missing() string // why there is none, or ""
	Changed() <-chan struct{}
}

// table is one that has to be in place.
type table interface{ Check() error }

// ledger knows what Envoy holds; *relay.Ledger is one.
type ledger interface {
	Missing(typeURL string, names ...string) []string
	Changed() <-chan struct{}
}

// state is what there was at one moment.
type state struct {
	missing    []string // in the order in which it comes, in words for a person; empty: ready
	configured bool     // Envoy runs and has accepted everything
	quiet      bool     // what is missing, if anything, tells of no event when it comes
	changed    [6]<-chan struct{}
}

// state looks at everything. As long as something is missing that tells when it comes, the kernel is asked for the message only.
func (r *readiness) state() state {
	s := r.told()
	s.quiet = len(s.missing) == 0
	var broken []string
	for _, t := range r.tables {
		if err := t.Check(); err != nil { // whoever guards the table is about to write it again
			broken = append(broken, err.Error())
		}
	}
	s.missing = append(broken, s.missing...)
	if !s.configured {
		return s
	}
	closed, err := notListening(r.envoy.user.UID, names.InboundPort, names.OutboundPort)
	switch {
	case err != nil:
		s.missing = append(s.missing, err.Error())
	case len(closed) > 0: // Envoy listens milliseconds after its ACK
		s.missing = append(s.missing, "envoy does not listen on port "+portList(closed))
	}
	return s
}

// told looks at what tells of its changes, without asking the kernel: it is for each of them.
func (r *readiness) told() state {
	pid, envoyChanged := r.envoy.get()
	s := state{changed: [6]<-chan struct{}{r.ledger.Changed(), r.source.Updated(), envoyChanged, r.verdicts.Changed(), r.packets.Changed()}}
	var unlike string
	unlike, s.changed[5] = r.identity() // after the verdicts' channel was read
	select {
	case <-r.stopping:
		s.missing = []string{"the agent is stopping"}
		return s
	default:
	}
	if _, err := r.source.GetX509SVID(); err != nil {
		s.missing = append(s.missing, err.Error())
	}
	for _, p := range []decided{r.verdicts, r.packets} {
		if why := p.Missing(); why != "" {
			s.missing = append(s.missing, why)
		}
	}
	if pid == 0 {
		s.missing = append(s.missing, "envoy is not running")
		return s
	}
	if unlike != "" {
		s.missing = append(s.missing, unlike)
	}
	unheld := r.ledger.Missing(relay.TypeListener, names.Inbound, names.Gate, names.Outbound)
	unheld = append(unheld, r.ledger.Missing(relay.TypeExtension, names.RBAC)...)
	if len(unheld) > 0 {
		why := "envoy has not accepted: " + strings.Join(unheld, ", ")
		if trouble := r.trouble(); trouble != "" {
			why += " (" + trouble + ")"
		}
		s.missing = append(s.missing, why)
		return s
	}
	s.configured = true
	return s
}

// For what tells of no event, between two looks: each asks the kernel for whole tables, and on a busy machine keeps from their work those who are waited for.
const (
	firstRecheck = 5 * time.Millisecond
	lastRecheck  = 100 * time.Millisecond
)

// wait returns nil as soon as nothing is missing, or what is missing when ctx or the agent ends.
func (r *readiness) wait(ctx context.Context) []string {
	for again := firstRecheck; ; {
		s := r.state()
		if len(s.missing) == 0 {
			return nil
		}
		var tick <-chan time.Time
		if s.quiet {
			tick = time.After(again)
			again = min(2*again, lastRecheck)
		}
		select {
		case <-ctx.Done():
			return r.state().missing // what told of no event may be there by now
		case <-r.stopping:
			return []string{"the agent is stopping"}
		case <-s.changed[0]:
		case <-s.changed[1]:
		case <-s.changed[2]:
		case <-s.changed[3]:
		case <-s.changed[4]:
		case <-s.changed[5]:
		case <-tick:
		}
	}
}

// watch logs when the pod becomes enforced and when it no longer is, until ctx ends.
func (r *readiness) watch(ctx context.Context, began time.Time, logger *slog.Logger) {
	for ctx.Err() == nil {
		if r.wait(ctx) != nil {
			return
		}
		r.beginning.enforced(logger)
		logger.Info("agent: ready", "after", time.Since(began).Round(time.Millisecond))
		for {
			s := r.told()
			if len(s.missing) > 0 {
				logger.Warn("agent: no longer ready", "missing", strings.Join(s.missing, "; "))
				break
			}
			select {
			case <-ctx.Done():
				return
			case <-r.stopping:
				return
			case <-s.changed[0]:
			case <-s.changed[1]:
			case <-s.changed[2]:
			case <-s.changed[3]:
			case <-s.changed[4]:
			case <-s.changed[5]:
			}
		}
	}
}
