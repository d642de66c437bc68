package agent

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/mantlet/mantlet/agent/netfilter/packet"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
)

// packets keeps the pod's policy on UDP and SCTP in the kernel.
//
//	control plane ──mantlet.v1.Packets──► relay ──Apply──► packet.Table (kernel) ──► ACK ··later··► packet.Revoke (conntrack)
//	                                                            ▲
//	                                     netfilter.Guard ──Repair┘
//
// The rules judge every packet of a flow, so that what is not allowed any more has ended when the kernel has taken them. What is left for later is
// that conntrack forgets such flows: those of a service have to be led to another endpoint, and the ports of those that a peer began are to be free for a
// flow that the pod begins.
//
// Until the first the pod is closed: nothing gets through but what is between it and its node. From then on the last that the kernel took is
// in force, however long the control plane is away.
type packets struct {
	logger *slog.Logger
	table  *packet.Table

	mu      sync.Mutex
	news    chan struct{} // holds one while due is new
	due     time.Time     // when conntrack is to forget what is not in force; zero: there is nothing
	forget  forgetting
	current *verdict.Packets // what is in force
	known   bool             // that is what the control plane has said, and not the closed beginning
	left    bool             // until then what is in force is what an agent before this one left
	refused error            // why the last that came is not in force
	changed chan struct{}
}

// closePackets closes the pod to UDP and SCTP.
func closePackets(logger *slog.Logger) (*packets, error) {
	table, closed := packet.OpenTable(logger), &verdict.Packets{}
	if err := table.Apply(closed); err != nil {
		return nil, err
	}
	return newPackets(logger, table, closed), nil
}

// adoptPackets closes the pod to UDP and SCTP where nobody has written the table yet. What an agent before this one was told stays in force
// until more is known.
func adoptPackets(logger *slog.Logger) (*packets, error) {
	table := packet.OpenTable(logger)
	there, err := table.There()
	if err != nil {
		return nil, err
	}
	if !there {
		table.Close()
		return closePackets(logger)
	}
	p := newPackets(logger, table, &verdict.Packets{})
	p.left = true
	return p, nil
}

func newPackets(logger *slog.Logger, table *packet.Table, current *verdict.Packets) *packets {
	return &packets{logger: logger, table: table, current: current, forget: defaultForgetting, changed: make(chan struct{}), news: make(chan struct{}, 1)}
}

// Apply puts a packet policy in force that wire.MarshalPackets wrote. It returns nil when the kernel has taken it, and otherwise why not; the
// one before stays then.
func (p *packets) Apply(b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	next, err := wire.UnmarshalPackets(b)
	if err == nil {
		err = p.enforce(next)
	}
	p.refused = err
	close(p.changed)
	p.changed = make(chan struct{})
	return err
}

func (p *packets) enforce(next *verdict.Packets) error {
	if err := p.table.Apply(next); err != nil {
		return err
	}
	before, known := p.current, p.known
	p.current, p.known = next, true
	switch {
	case known && packet.Misleads(before, next):
		p.forgetIn(p.forget.misled)
	case !known || packet.Releads(before, next): // an agent that begins has more urgent things to do
		p.forgetIn(p.forget.stuck)
	case !packet.Widens(before, next):
		p.forgetIn(p.forget.others + rand.N(p.forget.others))
	}
	return nil
}

// forgetting is how long conntrack may keep what policy does not allow any more. The kernel walks its whole table for each reading (see
// netfilter.Forget), which costs as much as many edits and which nothing may interrupt: so that is done once for all the policies that come
// meanwhile, and Envoy gets its share of the processor before.
type forgetting struct {
	// misled is for flows of services that are to go to another endpoint than theirs.
	misled time.Duration
	// stuck is for those that went nowhere, and may go to an endpoint now, and for all that an agent finds when it begins.
	stuck time.Duration
	// others is for those that end. Twice that at most, so that not all pods of a node read the table at once.
	others time.Duration
}

var defaultForgetting = forgetting{misled: 50 * time.Millisecond, stuck: time.Second, others: 5 * time.Second}

// forgetIn has run read conntrack then, if it is not to do so earlier.
func (p *packets) forgetIn(d time.Duration) {
	if at := time.Now().Add(d); p.due.IsZero() || at.Before(p.due) {
		p.due = at
		poke(p.news)
	}
}

// forgetFailures in a row are those after which the agent gives up.
const forgetFailures = 8

// run has conntrack forget flows that policy does not allow any more, until ctx ends (nil) or it fails again and again.
func (p *packets) run(ctx context.Context) error {
	current := func() *verdict.Packets {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.current
	}
	timer := time.NewTimer(0)
	timer.Stop()
	defer timer.Stop()
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-p.news:
			p.mu.Lock()
			if !p.due.IsZero() { // else it has come meanwhile
				timer.Reset(time.Until(p.due))
			}
			p.mu.Unlock()
			continue
		case <-timer.C:
		}
		p.mu.Lock()
		p.due = time.Time{}
		p.mu.Unlock()
		n, err := packet.Revoke(current)
		if n > 0 {
			p.logger.Info("agent: ended flows of UDP or SCTP that policy does not allow any more", "flows", n)
		}
		if err == nil {
			failures = 0
			continue
		}
		if failures++; failures == forgetFailures {
			return fmt.Errorf("flows that policy does not allow cannot be ended: %w", err)
		}
		p.logger.Error("agent: conntrack keeps flows that policy does not allow any more", "cause", err)
		p.mu.Lock()
		p.forgetIn(p.forget.misled << failures)
		p.mu.Unlock()
	}
}

// poke leaves word in a channel that holds one.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// close closes the connection to the kernel. What is in force stays.
func (p *packets) close() { p.table.Close() }

// Name, Wrote, Check and Repair let netfilter.Guard look after the table.
func (p *packets) Name() string { return packet.TableName }

// Wrote reports whether a transaction was Apply's.
func (p *packets) Wrote(port uint32) bool { return p.table.Wrote(port) }

// Check reads the table back.
func (p *packets) Check() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known || !p.left {
		return p.table.Check(p.current)
	}
	if there, err := p.table.There(); err != nil || there {
		return err
	}
	return fmt.Errorf("packets: table inet %s is gone", packet.TableName)
}

// Repair writes the table again.
func (p *packets) Repair() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left = false
	return p.table.Rewrite(p.current)
}

// Changed returns a channel that is closed at the next Apply. Take it before asking, so that no change is missed.
func (p *packets) Changed() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changed
}

// Missing says why no packet policy is in force, or is empty where there is one.
func (p *packets) Missing() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.known:
		return ""
	case p.refused != nil:
		return "no packet policy: that which the control plane sent cannot be put in force: " + p.refused.Error()
	}
	return "no packet policy from the control plane"
}
