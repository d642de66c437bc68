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
//	control plane ──mantlet.v1.Packets──► relay ──Apply──► packet.Apply (kernel) ──► ACK
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

// Apply puts a packet policy in force that wire.MarshalPackets wrote. It returns nil when the kernel has taken it, and otherwise why not; then
// the one before stays.
func (p *packets) Apply(b []byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	next, err := wire.UnmarshalPackets(b)
	if err == nil {
		err = packet.Apply(next)
	}
	p.refused = err
	if err == nil {
		p.current, p.known = next, true
	}
	close(p.changed)
	p.changed = make(chan struct{})
	return err
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
