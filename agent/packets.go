package agent

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/netfilter/packet"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
)

// packets keeps the pod's policy on UDP and SCTP in the kernel.
//
//	control plane ──mantlet.v1.Packets──► relay ──Apply──► packet.Apply (kernel) ──► ACK ──► packet.Revoke (conntrack)
//	                                                            ▲
//	                                     netfilter.Guard ──Repair┘
//
// Until the first the pod is closed: nothing gets through but what is between it and its node. From then on the last that the kernel took is
// in force, however long the control plane is away.
type packets struct {
	logger *slog.Logger
	conn   *netfilter.Conn

	mu      sync.Mutex
	news    chan struct{}    // holds one while flows are to be judged by what is in force
	current *verdict.Packets // what is in force
	known   bool             // that is what the control plane has said, and not the closed beginning
	left    bool             // until then what is in force is what an agent before this one left
	refused error            // why the last that came is not in force
	changed chan struct{}
}

// closePackets closes the pod to UDP and SCTP.
func closePackets(logger *slog.Logger) (*packets, error) {
	conn, closed := packet.Open(), &verdict.Packets{}
	if err := packet.Apply(conn, closed); err != nil {
		return nil, err
	}
	return &packets{logger: logger, conn: conn, current: closed, changed: make(chan struct{}), news: make(chan struct{}, 1)}, nil
}

// adoptPackets closes the pod to UDP and SCTP where nobody has written the table yet. What an agent before this one was told stays in force
// until more is known.
func adoptPackets(logger *slog.Logger) (*packets, error) {
	conn := packet.Open()
	there, err := packet.There(conn)
	if err != nil {
		return nil, err
	}
	if !there {
		conn.Close()
		return closePackets(logger)
	}
	return &packets{logger: logger, conn: conn, current: &verdict.Packets{}, left: true, changed: make(chan struct{}), news: make(chan struct{}, 1)}, nil
}

// Apply puts a packet policy in force that wire.MarshalPackets wrote. It returns nil when the kernel has taken it, and otherwise why not; the
// one before stays then. Flows that it does not allow any more are ended before the first returns, and later ones by run.
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
	if err := packet.Apply(p.conn, next); err != nil {
		return err
	}
	before := p.current
	p.current = next
	if !p.known { // what another agent let through
		if err := p.revoke(func() *verdict.Packets { return next }); err != nil {
			return err
		}
	}
	p.known = true
	if !packet.Widens(before, next) {
		poke(p.news)
	}
	return nil
}

func (p *packets) revoke(policy func() *verdict.Packets) error {
	n, err := packet.Revoke(policy)
	if n > 0 {
		p.logger.Info("agent: ended flows of UDP or SCTP that policy does not allow any more", "flows", n)
	}
	return err
}

const (
	// revokeGather is how long flows that have become forbidden may go on for policies to come that are part of the same edit, and for Envoy
	// to get its share of the processor before: judging flows costs as much as many edits (see packet.Revoke).
	revokeGather   = 50 * time.Millisecond
	revokeFailures = 8 // in a row, after which the agent gives up
)

// run ends flows that policy does not allow any more, until ctx ends (nil) or it fails again and again.
func (p *packets) run(ctx context.Context) error {
	current := func() *verdict.Packets {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.current
	}
	for failures := 0; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-p.news:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(revokeGather << failures):
		}
		err := p.revoke(current)
		if err == nil {
			failures = 0
			continue
		}
		if failures++; failures == revokeFailures {
			return fmt.Errorf("flows that policy does not allow cannot be ended: %w", err)
		}
		p.logger.Error("agent: flows that policy does not allow any more go on for now", "cause", err)
		poke(p.news)
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
func (p *packets) close() { p.conn.Close() }

// Name, Wrote, Check and Repair let netfilter.Guard look after the table.
func (p *packets) Name() string { return packet.TableName }

// Wrote reports whether a transaction was Apply's.
func (p *packets) Wrote(port uint32) bool { return p.conn.Wrote(port) }

// Check reads the table back.
func (p *packets) Check() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known || !p.left {
		return packet.Check(p.conn, p.current)
	}
	if there, err := packet.There(p.conn); err != nil || there {
		return err
	}
	return fmt.Errorf("packets: table inet %s is gone", packet.TableName)
}

// Repair writes the table again.
func (p *packets) Repair() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left = false
	return packet.Apply(p.conn, p.current)
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
