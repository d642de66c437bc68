package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/link"
	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/agent/revoke"
	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
)

// enforcer does what the agent of a pod asks for, and asks it about destinations.
type enforcer struct {
	conn    io.Closer
	link    *link.Link
	kernel  kernel
	destroy func([]revoke.Socket) []error

	mu       sync.Mutex
	question uint64
	waiting  map[uint64]chan *mantletv1.NodeAnswer
}

func newEnforcer(conn io.ReadWriteCloser, k kernel, destroy func([]revoke.Socket) []error) *enforcer {
	return &enforcer{conn: conn, link: link.New(conn), kernel: k, destroy: destroy, waiting: map[uint64]chan *mantletv1.NodeAnswer{}}
}

// kinds are those of requests, as kindOf has them.
var kinds = []int{1, 2, 3, 4, 5, 6}

// large is how many bytes a message may have beside others that are being worked on. Nothing is read while a larger one is: so that one pod's
// agent cannot have more of the node's memory than one message of link.MaxMessage takes.
const large = 1 << 20

// serve takes the agent's requests until ctx ends (nil) or the agent is gone (errDetached) or out of order. It leaves the connection closed: no
// agent that does not read holds it up.
func (e *enforcer) serve(ctx context.Context) error {
	work, ctx := errgroup.WithContext(ctx)
	defer context.AfterFunc(ctx, func() { _ = e.conn.Close() })()
	queues := map[int]chan *mantletv1.AgentMessage{}
	for _, kind := range kinds {
		q := make(chan *mantletv1.AgentMessage, 1) // the agent may have its result before the worker is back
		queues[kind] = q
		work.Go(func() error {
			for {
				select {
				case m := <-q:
					if err := e.work(m); err != nil {
						return err
					}
				case <-ctx.Done():
					return nil
				}
			}
		})
	}
	work.Go(func() error {
		err := e.receive(queues)
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the connection was closed here
		}
		return err
	})
	return work.Wait()
}

// receive hands requests to those who do them.
func (e *enforcer) receive(queues map[int]chan *mantletv1.AgentMessage) error {
	for {
		m := new(mantletv1.AgentMessage)
		if err := e.link.Receive(m); err != nil {
			return lost(err)
		}
		kind := kindOf(m)
		switch {
		case m.GetAnswer() != nil && m.GetRequest() == 0:
			e.answered(m.GetAnswer())
		case kind == 0 || m.GetRequest() == 0:
			return errors.New("the pod's agent says nothing that is known")
		case proto.Size(m) > large:
			if err := e.work(m); err != nil {
				return err
			}
		default:
			select {
			case queues[kind] <- m:
			default:
				return errors.New("the pod's agent does not wait for results")
			}
		}
	}
}

// lost tells an agent that has gone from one that is out of order.
func lost(err error) error {
	var network *net.OpError
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &network) {
		return errDetached
	}
	return fmt.Errorf("the pod's agent is out of order: %w", err)
}

// work does what a request asks for and answers it.
func (e *enforcer) work(m *mantletv1.AgentMessage) error {
	r := &mantletv1.NodeResult{Request: m.GetRequest()}
	if err := e.do(m, r); err != nil {
		r.Error = err.Error()
	}
	if err := e.link.Send(&mantletv1.NodeMessage{What: &mantletv1.NodeMessage_Result{Result: r}}); err != nil {
		return lost(err)
	}
	return nil
}

func (e *enforcer) do(m *mantletv1.AgentMessage, r *mantletv1.NodeResult) error {
	switch w := m.GetWhat().(type) {
	case *mantletv1.AgentMessage_Network:
		return bounded(w.Network, new(mantletv1.Network), e.kernel.applyNetwork)
	case *mantletv1.AgentMessage_Verdicts:
		return bounded(w.Verdicts, new(mantletv1.Verdicts), e.kernel.applyVerdicts)
	case *mantletv1.AgentMessage_Packets:
		return bounded(w.Packets, new(mantletv1.Packets), e.kernel.applyPackets)
	case *mantletv1.AgentMessage_Check:
		return e.kernel.Check()
	case *mantletv1.AgentMessage_Flip:
		return e.flip(w.Flip)
	case *mantletv1.AgentMessage_Destroy:
		return e.reset(w.Destroy, r)
	}
	return errors.New("not known") // kindOf says that it is
}

// bounded applies what the control plane is said to have written, a message of m's type, unless it would take more memory than such are to.
func bounded(b []byte, m proto.Message, apply func([]byte) error) error {
	if err := link.Bounded(b, m); err != nil {
		return err
	}
	return apply(b)
}

func (e *enforcer) flip(f *mantletv1.NodeFlip) error {
	answers := map[netip.AddrPort]relay.Verdict{}
	for v, list := range map[relay.Verdict][]*mantletv1.NodeEndpoint{relay.Allowed: f.GetAllowed(), relay.Denied: f.GetDenied(), relay.Unknown: f.GetUnknown()} {
		dests, err := link.AddrPorts(list)
		if err != nil {
			return err
		}
		for _, d := range dests {
			if _, twice := answers[d]; twice {
				return fmt.Errorf("two answers for %s", d)
			}
			answers[d] = v
		}
	}
	e.kernel.flip(answers)
	return nil
}

func (e *enforcer) reset(list *mantletv1.NodeSockets, r *mantletv1.NodeResult) error {
	sockets := make([]revoke.Socket, len(list.GetSockets()))
	for i, k := range list.GetSockets() {
		local, err := link.AddrPort(k.GetLocal())
		if err != nil {
			return err
		}
		remote, err := link.AddrPort(k.GetRemote())
		if err != nil {
			return err
		}
		if len(k.GetCookie()) != 8 {
			return fmt.Errorf("a socket's cookie of %d bytes, not 8", len(k.GetCookie()))
		}
		sockets[i] = revoke.Socket{Local: local, Remote: remote, Cookie: [8]byte(k.GetCookie())}
	}
	r.Sockets = make([]uint32, len(sockets))
	for i, err := range e.destroy(sockets) {
		if err == nil {
			continue
		}
		errno := unix.EIO
		_ = errors.As(err, &errno)
		r.Sockets[i] = uint32(errno)
	}
	return nil
}

// Ask implements hold.Asker.
func (e *enforcer) Ask(ctx context.Context, dest netip.AddrPort) (allowed bool, err error) {
	c := make(chan *mantletv1.NodeAnswer, 1)
	e.mu.Lock()
	e.question++
	number := e.question
	e.waiting[number] = c
	e.mu.Unlock()
	defer func() {
		e.mu.Lock()
		delete(e.waiting, number)
		e.mu.Unlock()
	}()
	q := &mantletv1.NodeQuestion{Question: number, Destination: link.Endpoint(dest)}
	if err := e.link.Send(&mantletv1.NodeMessage{What: &mantletv1.NodeMessage_Question{Question: q}}); err != nil {
		return false, err
	}
	select {
	case a := <-c:
		if a.GetError() != "" {
			return false, errors.New(a.GetError())
		}
		return a.GetAllowed(), nil
	case <-ctx.Done():
		return false, fmt.Errorf("the pod's agent has not answered: %w", ctx.Err())
	}
}

// answered hands on an answer to whoever still waits for it.
func (e *enforcer) answered(a *mantletv1.NodeAnswer) {
	e.mu.Lock()
	c := e.waiting[a.GetQuestion()]
	delete(e.waiting, a.GetQuestion())
	e.mu.Unlock()
	if c != nil {
		c <- a
	}
}

// Forget tells the agent which destinations the hold has let go.
func (e *enforcer) Forget(dests []netip.AddrPort) {
	f := &mantletv1.NodeDestinations{Destinations: link.Endpoints(dests)}
	_ = e.link.Send(&mantletv1.NodeMessage{What: &mantletv1.NodeMessage_Forgotten{Forgotten: f}}) // the end of the link is noticed elsewhere
}

// refused tells the agent of a refused connection.
func (e *enforcer) refused(r hold.Refusal) {
	m := &mantletv1.NodeRefusal{Source: link.Endpoint(r.Source), Destination: link.Endpoint(r.Destination), Inbound: r.Inbound}
	_ = e.link.Send(&mantletv1.NodeMessage{What: &mantletv1.NodeMessage_Refused{Refused: m}})
}
