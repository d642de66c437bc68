package agent

import (
	"log/slog"
	"sync"

	"github.com/mantlet/mantlet/agent/netfilter/packet"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
)

// packets keeps the pod's policy on UDP and SCTP in the kernel.
//
//	control plane ──mantlet.v1.Packets──► relay ──Apply──► packet.Apply (kernel) ──► packet.Revoke (conntrack) ──► ACK
//	                                                            ▲
//	                                     netfilter.Guard ──Repair┘
//
// Until the first the pod is closed: nothing gets through but what is between it and its node. From then on the last that the kernel took is
// in force, however long the control plane is away.
type packets struct {
	logger *slog.Logger

	mu      sync.Mutex
	current *verdict.Packets // what is in force
	known   bool             // that is what the control plane has said, and not the closed beginning
	refused error            // why the last that came is not in force
	changed chan struct{}
}

// closePackets closes the pod to UDP and SCTP.
func closePackets(logger *slog.Logger) (*packets, error) {
	closed := &verdict.Packets{}
	if err := packet.Apply(closed); err != nil {
		return nil, err
	}
	return &packets{logger: logger, current: closed, changed: make(chan struct{})}, nil
}

// Apply puts a packet policy in force that wire.MarshalPackets wrote. It returns nil when the kernel has taken it and the flows
// that it does not allow are ended, and otherwise why not; where the kernel has not taken it the one before stays.
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
	if err := packet.Apply(next); err != nil {
		return err
	}
	p.current, p.known = next, true
	n, err := packet.Revoke(next)
	if n > 0 {
		p.logger.Info("agent: ended flows of UDP or SCTP that policy does not allow any more", "flows", n)
	}
	return err
}

// Name, Check and Repair let netfilter.Guard look after the table.
func (p *packets) Name() string { return packet.TableName }

// Check reads the table back.
func (p *packets) Check() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return packet.Check(p.current)
}

// Repair writes the table again.
func (p *packets) Repair() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return packet.Apply(p.current)
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
