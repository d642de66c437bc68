package agent

import (
	"context"
	"net"
	"sync"

	"github.com/mantlet/mantlet/agent/netfilter"
)

// signal is given once.
type signal struct {
	once  sync.Once
	given chan struct{}
}

func newSignal() *signal { return &signal{given: make(chan struct{})} }

func (s *signal) give() { s.once.Do(func() { close(s.given) }) }

func (s *signal) was() bool {
	select {
	case <-s.given:
		return true
	default:
		return false
	}
}

// dial opens a connection past the redirect. In node mode that lets the agent's user pass from when the node's daemon has first come to the pod; who was
// refused before tries again then, rather than after a pause. Later the redirect remembers, daemon or not.
func (a *agent) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if a.cfg.Capture != CaptureNode {
		return netfilter.Dial(ctx, network, address)
	}
	d := net.Dialer{Resolver: &net.Resolver{PreferGo: true}}
	late := a.exempted.was()
	conn, err := d.DialContext(ctx, network, address)
	if err == nil || late {
		return conn, err
	}
	select {
	case <-a.exempted.given:
		return d.DialContext(ctx, network, address)
	case <-ctx.Done():
		return nil, err
	}
}
