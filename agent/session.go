package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/link"
	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
)

// askPatience bounds the wait for a result: a kernel that takes a policy of a million addresses answers in seconds.
const askPatience = 20 * time.Second

// session is one daemon's time with the pod.
type session struct {
	remote *remote
	conn   net.Conn
	link   *link.Link
	ctx    context.Context // ends with the session
	end    context.CancelCauseFunc

	kinds [8]sync.Mutex // one request of each kind at a time

	mu      sync.Mutex
	request uint64
	waiting map[uint64]chan *mantletv1.NodeResult
}

func newSession(ctx context.Context, conn net.Conn, r *remote) *session {
	s := &session{remote: r, conn: conn, link: link.New(conn), waiting: map[uint64]chan *mantletv1.NodeResult{}}
	s.ctx, s.end = context.WithCancelCause(ctx)
	return s
}

// run tells what stands and hears what the daemon says, until either end has enough.
func (s *session) run() {
	defer s.conn.Close()
	defer context.AfterFunc(s.ctx, func() { _ = s.conn.Close() })()
	s.remote.logger.Info("agent: the node's daemon has come")
	var told sync.WaitGroup
	defer told.Wait()
	for _, w := range []*standing{s.remote.network, s.remote.rules, s.remote.packets} {
		told.Go(func() { w.tell(s) })
	}
	told.Go(func() {
		// The daemon's child answers once the redirect exempts this agent. What it finds there is no matter here.
		_, _ = s.ask(&mantletv1.AgentMessage{What: &mantletv1.AgentMessage_Check{Check: &mantletv1.NodeCheck{}}})
		if s.ctx.Err() == nil {
			s.remote.exempted()
		}
	})
	if s.remote.attached != nil {
		told.Go(s.remote.attached)
	}
	for {
		m := new(mantletv1.NodeMessage)
		err := s.link.Receive(m)
		if err == nil {
			err = s.hear(m, &told)
		}
		if err != nil {
			s.end(err)
			s.remote.logger.Warn("agent: the node's daemon has gone; the kernel keeps what it has until it is back", "cause", context.Cause(s.ctx))
			return
		}
	}
}

// hear takes a message. What takes time it leaves to others.
func (s *session) hear(m *mantletv1.NodeMessage, others *sync.WaitGroup) error {
	switch w := m.GetWhat().(type) {
	case *mantletv1.NodeMessage_Result:
		s.mu.Lock()
		c := s.waiting[w.Result.GetRequest()]
		delete(s.waiting, w.Result.GetRequest())
		s.mu.Unlock()
		if c != nil {
			c <- w.Result
		}
	case *mantletv1.NodeMessage_Question:
		dest, err := link.AddrPort(w.Question.GetDestination())
		if err != nil {
			return err
		}
		others.Go(func() {
			a := &mantletv1.NodeAnswer{Question: w.Question.GetQuestion()}
			if a.Allowed, err = s.remote.asker.Ask(s.ctx, dest); err != nil {
				a.Allowed, a.Error = false, err.Error()
			}
			if err := s.link.Send(&mantletv1.AgentMessage{What: &mantletv1.AgentMessage_Answer{Answer: a}}); err != nil {
				s.end(err)
			}
		})
	case *mantletv1.NodeMessage_Forgotten:
		dests, err := link.AddrPorts(w.Forgotten.GetDestinations())
		if err != nil {
			return err
		}
		s.remote.asker.Forget(dests)
	case *mantletv1.NodeMessage_Refused:
		source, err := link.AddrPort(w.Refused.GetSource())
		if err != nil {
			return err
		}
		dest, err := link.AddrPort(w.Refused.GetDestination())
		if err != nil {
			return err
		}
		s.remote.refused(hold.Refusal{Source: source, Destination: dest, Inbound: w.Refused.GetInbound()})
	default:
		return errors.New("the node's daemon says nothing that is known")
	}
	return nil
}

// ask makes a request and waits for its result. An error in the result is returned.
func (s *session) ask(m *mantletv1.AgentMessage) (*mantletv1.NodeResult, error) {
	kind := &s.kinds[kindOf(m)]
	kind.Lock()
	defer kind.Unlock()
	c := make(chan *mantletv1.NodeResult, 1)
	s.mu.Lock()
	s.request++
	m.Request = s.request
	s.waiting[m.Request] = c
	s.mu.Unlock()
	if err := s.link.Send(m); err != nil {
		s.end(err)
		return nil, err
	}
	patience := time.NewTimer(askPatience)
	defer patience.Stop()
	select {
	case r := <-c:
		if r.GetError() != "" {
			return nil, errors.New(r.GetError())
		}
		return r, nil
	case <-patience.C:
		s.end(fmt.Errorf("no result within %s", askPatience)) // another child is started then
	case <-s.ctx.Done():
	}
	return nil, fmt.Errorf("the node's daemon has gone: %w", context.Cause(s.ctx))
}

// kindOf numbers the kinds of requests.
func kindOf(m *mantletv1.AgentMessage) int {
	switch m.GetWhat().(type) {
	case *mantletv1.AgentMessage_Network:
		return 1
	case *mantletv1.AgentMessage_Verdicts:
		return 2
	case *mantletv1.AgentMessage_Packets:
		return 3
	case *mantletv1.AgentMessage_Flip:
		return 4
	case *mantletv1.AgentMessage_Destroy:
		return 5
	case *mantletv1.AgentMessage_Check:
		return 6
	}
	return 0
}

// admitRoot fails unless root of the machine is at the other end of a unix socket. In a user namespace that is who is not mapped there.
func admitRoot(conn net.Conn) error {
	cred, err := link.Credentials(conn.(*net.UnixConn))
	if err != nil {
		return err
	}
	if cred.Uid == 0 || cred.Uid == overflowUID() && cred.Uid != uint32(os.Geteuid()) {
		return nil
	}
	return fmt.Errorf("user %d is not root of this node", cred.Uid)
}

// overflowUID is as whom users appear that a user namespace does not map (user_namespaces(7)).
func overflowUID() uint32 {
	text, err := os.ReadFile("/proc/sys/kernel/overflowuid")
	if err == nil {
		if n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 32); err == nil {
			return uint32(n)
		}
	}
	return 65534
}
