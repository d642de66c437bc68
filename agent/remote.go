package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/link"
	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/agent/revoke"
	"github.com/mantlet/mantlet/agent/verdicts"
	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
)

// remote has the node's daemon work in the kernel, over a socket in the run directory to which the daemon connects. No other container of the
// pod has that directory; whoever connects must be root of the machine.
//
// What the control plane sent is told to each daemon that comes, and the control plane hears of success when a daemon's kernel has it:
// while none is there it waits. What was in the kernel stays there meanwhile.
type remote struct {
	listener net.Listener
	asker    destinations
	verdicts *verdicts.Holder
	refused  func(hold.Refusal)
	exempted func() // told when a daemon has come and the redirect exempts the agent's user
	attached func() // told of each daemon that has come; nil: nobody is
	logger   *slog.Logger
	done     chan struct{} // closed at the end

	network, rules, packets *standing // what the control plane said

	mu   sync.Mutex
	peer *session // the daemon's child; nil: it is not there
}

func newRemote(l net.Listener, asker destinations, v *verdicts.Holder, refused func(hold.Refusal), exempted func(), logger *slog.Logger) *remote {
	return &remote{listener: l, asker: asker, verdicts: v, refused: refused, exempted: exempted, logger: logger, done: make(chan struct{}),
		network: newStanding(func(b []byte) *mantletv1.AgentMessage {
			return &mantletv1.AgentMessage{What: &mantletv1.AgentMessage_Network{Network: b}}
		}),
		rules: newStanding(func(b []byte) *mantletv1.AgentMessage {
			return &mantletv1.AgentMessage{What: &mantletv1.AgentMessage_Verdicts{Verdicts: b}}
		}),
		packets: newStanding(func(b []byte) *mantletv1.AgentMessage {
			return &mantletv1.AgentMessage{What: &mantletv1.AgentMessage_Packets{Packets: b}}
		}),
	}
}

// errNoDaemon is what is missing while no daemon is attached.
var errNoDaemon = errors.New("waiting for the node's daemon (mantlet-agent node), which has not come to this pod")

// run admits the daemon, again each time it comes, until ctx ends.
func (r *remote) run(ctx context.Context) error {
	defer close(r.done)
	defer context.AfterFunc(ctx, func() { _ = r.listener.Close() })()
	var sessions sync.WaitGroup
	defer sessions.Wait()
	for {
		conn, err := r.listener.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("node socket: %w", err)
		}
		if err := admitRoot(conn); err != nil {
			r.logger.Warn("node socket: refused", "error", err)
			conn.Close()
			continue
		}
		s := newSession(ctx, conn, r)
		if before := r.attach(s); before != nil { // whose end has not been noticed yet
			before.end(errors.New("the daemon came again"))
		}
		sessions.Go(func() {
			s.run()
			r.detach(s)
		})
	}
}

func (r *remote) attach(s *session) (before *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	before, r.peer = r.peer, s
	return before
}

func (r *remote) detach(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.peer == s {
		r.peer = nil
	}
}

func (r *remote) current() *session {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.peer
}

func (r *remote) applyNetwork(b []byte) error { return r.network.put(b, r.done) }

// applyVerdicts puts verdicts in force here, where revocation goes by them, and in the kernel.
func (r *remote) applyVerdicts(b []byte) error {
	if err := r.verdicts.Apply(b); err != nil {
		return err
	}
	return r.rules.put(b, r.done)
}

func (r *remote) applyPackets(b []byte) error { return r.packets.put(b, r.done) }

// Missing says why no packet policy is in force.
func (r *remote) Missing() string {
	switch known, err := r.packets.state(); {
	case known:
		return ""
	case err != nil:
		return "no packet policy: that which the control plane sent cannot be put in force: " + err.Error()
	}
	return "no packet policy from the control plane"
}

// Changed returns a channel that is closed when the packet policy changes.
func (r *remote) Changed() <-chan struct{} { return r.packets.changes() }

// flip tells the daemon. One that is not there knows nothing of any destination when it comes.
func (r *remote) flip(answers map[netip.AddrPort]relay.Verdict) {
	s := r.current()
	if s == nil {
		return
	}
	f := &mantletv1.NodeFlip{}
	for dest, v := range answers {
		switch e := link.Endpoint(dest); v {
		case relay.Allowed:
			f.Allowed = append(f.Allowed, e)
		case relay.Denied:
			f.Denied = append(f.Denied, e)
		default:
			f.Unknown = append(f.Unknown, e)
		}
	}
	if _, err := s.ask(&mantletv1.AgentMessage{What: &mantletv1.AgentMessage_Flip{Flip: f}}); err != nil {
		r.logger.Error("hold: new verdicts cannot be written", "destinations", len(answers), "error", err)
	}
}

// Check asks the daemon whether redirect and SYN hold are in place.
func (r *remote) Check() error {
	s := r.current()
	if s == nil {
		return errNoDaemon
	}
	_, err := s.ask(&mantletv1.AgentMessage{What: &mantletv1.AgentMessage_Check{Check: &mantletv1.NodeCheck{}}})
	return err
}

// destroy has the daemon reset sockets.
func (r *remote) destroy(list []revoke.Socket) []error {
	sockets := &mantletv1.NodeSockets{}
	for _, k := range list {
		sockets.Sockets = append(sockets.Sockets, &mantletv1.NodeSocket{Local: link.Endpoint(k.Local), Remote: link.Endpoint(k.Remote), Cookie: k.Cookie[:]})
	}
	errs := make([]error, len(list))
	result, err := (*mantletv1.NodeResult)(nil), errNoDaemon
	if s := r.current(); s != nil {
		result, err = s.ask(&mantletv1.AgentMessage{What: &mantletv1.AgentMessage_Destroy{Destroy: sockets}})
	}
	if err == nil && len(result.GetSockets()) != len(list) {
		err = fmt.Errorf("the node's daemon told of %d sockets, not %d", len(result.GetSockets()), len(list))
	}
	for i := range errs {
		switch {
		case err != nil:
			errs[i] = err
		case result.GetSockets()[i] != 0:
			errs[i] = unix.Errno(result.GetSockets()[i])
		}
	}
	return errs
}
