package agent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"github.com/mantlet/mantlet/agent/link"
	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/agent/revoke"
	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
)

// noKernel takes whatever it is told, as soon as it may.
type noKernel struct {
	kernel
	gate chan struct{} // closed: it may

	mu      sync.Mutex
	flipped map[netip.AddrPort]relay.Verdict
}

func (k *noKernel) applyNetwork([]byte) error   { return nil }
func (k *noKernel) applyVerdicts([]byte) error  { <-k.gate; return nil }
func (k *noKernel) applyPackets(b []byte) error { return errors.New("refused: " + string(b)) }
func (k *noKernel) Check() error                { return nil }
func (k *noKernel) flip(answers map[netip.AddrPort]relay.Verdict) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.flipped = answers
}

func open() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

// served is an enforcer at one end of a connection, and the other end.
func served(t *testing.T, k *noKernel) (agent net.Conn, ended chan error) {
	t.Helper()
	t.Cleanup(func() { goleak.VerifyNone(t) })
	agent, child := net.Pipe()
	e := newEnforcer(child, k, func(list []revoke.Socket) []error { return make([]error, len(list)) })
	ended = make(chan error, 1)
	go func() {
		ended <- e.serve(t.Context())
	}()
	t.Cleanup(func() { agent.Close() })
	return agent, ended
}

// An agent that is out of order is let go, whatever it says.
func TestHostileAgent(t *testing.T) {
	verdicts := func(n uint64) *mantletv1.AgentMessage {
		return &mantletv1.AgentMessage{Request: n, What: &mantletv1.AgentMessage_Verdicts{}}
	}
	endpoint := link.Endpoint(netip.MustParseAddrPort("10.0.0.1:80"))
	for _, c := range []struct {
		name  string
		says  []*mantletv1.AgentMessage
		wants string
	}{
		{"nothing that is known", []*mantletv1.AgentMessage{{Request: 1}}, "nothing that is known"},
		{"a request without a number", []*mantletv1.AgentMessage{verdicts(0)}, "nothing that is known"},
		{"an answer with one", []*mantletv1.AgentMessage{{Request: 1, What: &mantletv1.AgentMessage_Answer{}}}, "nothing that is known"},
		{"requests without an end", []*mantletv1.AgentMessage{verdicts(1), verdicts(2), verdicts(3), verdicts(4)}, "does not wait"},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := &noKernel{gate: make(chan struct{})}
			agent, ended := served(t, k)
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				for _, m := range c.says {
					if link.New(agent).Send(m) != nil {
						return
					}
				}
			}()
			time.AfterFunc(50*time.Millisecond, func() { close(k.gate) }) // the worker's end is waited for
			defer func() { <-sent }()
			if err := <-ended; err == nil || errors.Is(err, errDetached) || !strings.Contains(err.Error(), c.wants) {
				t.Errorf("ended with %v, want %q", err, c.wants)
			}
		})
	}
	t.Run("what it may not ask for is refused", func(t *testing.T) {
		agent, ended := served(t, &noKernel{gate: open()})
		l := link.New(agent)
		for i, m := range []*mantletv1.AgentMessage{
			{What: &mantletv1.AgentMessage_Packets{Packets: []byte("x")}},
			{What: &mantletv1.AgentMessage_Verdicts{Verdicts: bytes.Repeat([]byte{0x2a, 0}, link.MaxParts+1)}},
			{What: &mantletv1.AgentMessage_Network{Network: bytes.Repeat([]byte{0x0a, 0}, link.MaxParts+1)}},
			{What: &mantletv1.AgentMessage_Flip{Flip: &mantletv1.NodeFlip{Allowed: []*mantletv1.NodeEndpoint{{Address: []byte{1}}}}}},
			{What: &mantletv1.AgentMessage_Flip{Flip: &mantletv1.NodeFlip{Allowed: []*mantletv1.NodeEndpoint{endpoint}, Denied: []*mantletv1.NodeEndpoint{endpoint}}}},
			{What: &mantletv1.AgentMessage_Destroy{Destroy: &mantletv1.NodeSockets{Sockets: []*mantletv1.NodeSocket{{}}}}},
			{What: &mantletv1.AgentMessage_Destroy{Destroy: &mantletv1.NodeSockets{Sockets: []*mantletv1.NodeSocket{{Local: endpoint, Remote: endpoint, Cookie: []byte{1}}}}}},
		} {
			m.Request = uint64(i + 1)
			if err := l.Send(m); err != nil {
				t.Fatal(err)
			}
			got := new(mantletv1.NodeMessage)
			if err := l.Receive(got); err != nil {
				t.Fatal(err)
			}
			if r := got.GetResult(); r.GetRequest() != m.GetRequest() || r.GetError() == "" {
				t.Errorf("%v: %v", m, got)
			}
		}
		agent.Close()
		if err := <-ended; !errors.Is(err, errDetached) {
			t.Errorf("an agent that goes: %v", err)
		}
	})
	t.Run("an announcement without an end", func(t *testing.T) {
		agent, ended := served(t, &noKernel{gate: open()})
		if _, err := agent.Write(binary.BigEndian.AppendUint32(nil, link.MaxMessage+1)); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err == nil || errors.Is(err, errDetached) {
			t.Errorf("ended with %v", err)
		}
	})
}

// Whatever bytes an agent sends, the child ends in good order.
func FuzzHostileAgent(f *testing.F) {
	frame := func(m *mantletv1.AgentMessage) []byte {
		var b bytes.Buffer
		if err := link.New(&b).Send(m); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	endpoint := link.Endpoint(netip.MustParseAddrPort("10.0.0.1:80"))
	f.Add(frame(&mantletv1.AgentMessage{Request: 1, What: &mantletv1.AgentMessage_Flip{Flip: &mantletv1.NodeFlip{Allowed: []*mantletv1.NodeEndpoint{endpoint}}}}))
	f.Add(frame(&mantletv1.AgentMessage{Request: 2, What: &mantletv1.AgentMessage_Destroy{Destroy: &mantletv1.NodeSockets{
		Sockets: []*mantletv1.NodeSocket{{Local: endpoint, Remote: endpoint, Cookie: make([]byte, 8)}}}}}))
	f.Add(frame(&mantletv1.AgentMessage{What: &mantletv1.AgentMessage_Answer{Answer: &mantletv1.NodeAnswer{Question: 1}}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		e := newEnforcer(struct {
			io.Reader
			io.Writer
			io.Closer
		}{bytes.NewReader(b), &out, io.NopCloser(nil)}, &noKernel{gate: open()}, func(list []revoke.Socket) []error { return make([]error, len(list)) })
		if err := e.serve(t.Context()); err == nil {
			t.Error("it did not end")
		}
		for answers := link.New(&out); ; {
			m := new(mantletv1.NodeMessage)
			if err := answers.Receive(m); errors.Is(err, io.EOF) {
				return
			} else if err != nil {
				t.Fatal(err)
			}
			if m.GetResult() == nil || proto.Size(m) > 1<<20 {
				t.Errorf("it says %v", m)
			}
		}
	})
}
