package agent

import (
	"errors"
	"sync"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
)

// standing is something that the control plane said and that every daemon has to have. The last that a daemon took stands.
type standing struct {
	message func(b []byte) *mantletv1.AgentMessage

	mu      sync.Mutex
	wanted  []byte // what is to be told; nil: nothing
	number  int    // of wanted
	good    []byte // what a daemon took; nil: nothing
	settled int    // number of the last that was taken or refused
	err     error  // why the last was refused
	changed chan struct{}
}

func newStanding(message func([]byte) *mantletv1.AgentMessage) *standing {
	return &standing{message: message, changed: make(chan struct{})}
}

// put has daemons told, and returns when one has it in its kernel (nil), or refuses it; then what was good before stands.
func (s *standing) put(b []byte, done <-chan struct{}) error {
	s.mu.Lock()
	s.number++
	mine := s.number
	s.wanted = append([]byte{}, b...) // a message without fields has no bytes, and is one
	s.change()
	for s.settled < mine {
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-done:
			return errors.New("the agent is stopping")
		}
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	return s.err
}

// change tells those who wait; the caller holds the lock.
func (s *standing) change() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *standing) changes() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changed
}

// state tells whether something is in force, and why the last that came is not.
func (s *standing) state() (known bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.good != nil, s.err
}

// next is what a daemon is to be told that was told as far as told, its number, and a channel that is closed when that is another. nil: nothing.
func (s *standing) next(told int) (b []byte, number int, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.number == told {
		return nil, told, s.changed
	}
	return s.wanted, s.number, s.changed
}

// settle takes down what became of a number.
func (s *standing) settle(number int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if number != s.number { // a newer one is on its way
		return
	}
	s.settled, s.err = number, err
	if err == nil {
		s.good = s.wanted
	} else {
		s.wanted = s.good
	}
	s.change()
}

// tell tells one daemon, whatever comes, until its session ends.
func (s *standing) tell(to *session) {
	for told := 0; ; {
		b, number, changed := s.next(told)
		if b != nil {
			_, err := to.ask(s.message(b))
			if to.ctx.Err() != nil {
				return // the next daemon is told
			}
			s.settle(number, err)
		}
		told = number
		if b == nil {
			select {
			case <-changed:
			case <-to.ctx.Done():
				return
			}
		}
	}
}
