package hammer

import (
	"fmt"
	"sync"
	"time"
)

// Settling is how much earlier than an attempt a state must have been confirmed to be in force for certain. Envoy confirms a listener or
// a cluster when its main thread has taken it; its workers follow as soon as they run.
const Settling = 250 * time.Millisecond

// Allows says whether a state of policy lets a peer reach a target.
type Allows func(peer, target string) bool

// Chronicle is the history of policy: one state after the other. It is safe for concurrent use.
type Chronicle struct {
	mu     sync.Mutex
	states []state
}

type state struct {
	allows    Allows
	begun     time.Time // from here on it may be in force
	confirmed time.Time // from here on every sidecar has said that it is; zero: not yet
}

// NewChronicle begins with a state that is in force everywhere.
func NewChronicle(first Allows) *Chronicle {
	return &Chronicle{states: []state{{allows: first}}}
}

// Begin is for the moment before a state is handed to the control plane.
func (c *Chronicle) Begin(next Allows) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.states = append(c.states, state{allows: next, begun: time.Now()})
}

// Confirm is for the moment when every sidecar has confirmed the last state that was begun.
func (c *Chronicle) Confirm() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.states[len(c.states)-1].confirmed = time.Now()
}

// Verdict is what is known of an attempt that lasted from one time to another.
type Verdict uint8

// What may be known.
const (
	Either  Verdict = iota // some of the states allow it, some do not
	Denied                 // none of the states allows it
	Allowed                // all of them do
)

func (v Verdict) String() string { return [...]string{"either", "denied", "allowed"}[v] }

// Settled is from when on the last state that was begun is the only one in force; it must have been confirmed.
func (c *Chronicle) Settled() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.states[len(c.states)-1].confirmed.Add(Settling)
}

// Judge says what had to become of an attempt, and how many states may have been in force while it lasted.
func (c *Chronicle) Judge(peer, target string, began, ended time.Time) (v Verdict, states int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := len(c.states) - 1
	for ; first > 0; first-- {
		s := c.states[first]
		if !s.confirmed.IsZero() && !s.confirmed.Add(Settling).After(began) {
			break
		}
	}
	allowed, denied := 0, 0
	for i, s := range c.states[first:] {
		if i > 0 && s.begun.After(ended) {
			break
		}
		if s.allows(peer, target) {
			allowed++
		} else {
			denied++
		}
	}
	states = allowed + denied
	switch {
	case allowed == 0:
		return Denied, states
	case denied == 0:
		return Allowed, states
	}
	return Either, states
}

// Len is how many states there have been.
func (c *Chronicle) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.states)
}

// Tally counts attempts by what had to become of them, and holds the first complaints.
type Tally struct {
	Attempts                int
	Denied, Allowed, Either int
	Answered                int    // of all
	Echoed                  uint64 // bytes of streams
	Breaks, Excused         int    // of streams, and how many of those because an end was killed
	Datagrams, Lost         int    // exchanges of datagrams among the attempts, and how many of those got no answer that they had to get
	Wrong                   int
	Complaints              []string // the first of them
	Windows                 Windows
}

const maxComplaints = 20

func (t *Tally) complain(format string, args ...any) {
	t.Wrong++
	if len(t.Complaints) < maxComplaints {
		t.Complaints = append(t.Complaints, fmt.Sprintf(format, args...))
	}
}

// Add adds another tally.
func (t *Tally) Add(o *Tally) {
	t.Attempts += o.Attempts
	t.Denied += o.Denied
	t.Allowed += o.Allowed
	t.Either += o.Either
	t.Answered += o.Answered
	t.Echoed += o.Echoed
	t.Breaks += o.Breaks
	t.Excused += o.Excused
	t.Datagrams += o.Datagrams
	t.Lost += o.Lost
	t.Wrong += o.Wrong
	t.Windows.add(o.Windows)
	t.Complaints = append(t.Complaints, o.Complaints[:min(len(o.Complaints), maxComplaints-min(maxComplaints, len(t.Complaints)))]...)
}

func (t *Tally) String() string {
	text := fmt.Sprintf("%d attempts: %d that had to be denied, %d that had to be answered, %d that could be either; %d answered; %d wrong",
		t.Attempts, t.Denied, t.Allowed, t.Either, t.Answered, t.Wrong)
	if t.Datagrams > 0 {
		text += fmt.Sprintf("; %d of them datagrams, of which %d got no answer that they had to get", t.Datagrams, t.Lost)
	}
	if t.Echoed > 0 {
		text += fmt.Sprintf("; streams: %d bytes came back as they were sent, %d breaks, %d of them where an end was killed", t.Echoed, t.Breaks, t.Excused)
	}
	return text
}
