package relay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// question is what the agent asks about a destination, until it forgets it.
type question struct {
	dest    netip.AddrPort
	waiting map[chan answer]bool // those who have no answer yet; each channel takes one
	told    Verdict
}

type answer struct {
	allowed bool
	err     error
}

// Verdict is what is known of a destination.
type Verdict uint8

const (
	// Unknown is nothing: whoever wants to connect there is to ask.
	Unknown Verdict = iota
	// Denied is that the pod may not connect there.
	Denied
	// Allowed is that it may.
	Allowed
)

// Ask asks whether the pod may connect to a destination inside the cluster: whether the on-demand cluster od|IP:PORT has endpoints. What is
// known is answered from the cache, also without a control plane; what is not is asked on the pod's stream. When it says yes, Envoy holds
// the cluster (or is away, and will be given it first of all). An error means no: the control plane cannot be reached or does not answer before ctx ends, Envoy
// refuses the cluster, it cannot be read, or too many names are known.
//
// From then on the destination is followed ([Relay.OnDestinations]) until it is forgotten ([Relay.Forget]).
func (r *Relay) Ask(ctx context.Context, dest netip.AddrPort) (allowed bool, err error) {
	if !dest.IsValid() || dest.Port() == 0 {
		return false, fmt.Errorf("%s is no destination", dest)
	}
	reply := make(chan answer, 1)
	if !r.do(ctx, func() { r.machine.ask(dest, reply) }) {
		return false, r.gone(ctx)
	}
	select {
	case a := <-reply:
		return a.allowed, a.err
	case <-ctx.Done():
	case <-r.closed.Done():
	}
	go r.do(r.closed, func() { r.machine.leave(dest, reply) })
	return false, r.gone(ctx)
}

func (r *Relay) gone(ctx context.Context) error {
	if r.closed.Err() != nil {
		return errors.New("the agent is stopping")
	}
	return fmt.Errorf("the control plane has not answered: %w", ctx.Err())
}

// OnDestinations has every later change of an answer told, in the order in which the control plane sent: a denial before Envoy gets the emptied cluster,
// an admission after Envoy has ACKed the new one. What is denied and comes to be admitted is forgotten here, and told as Unknown, before
// the control plane hears that it is in force: an edit may admit hundreds of destinations that nobody will connect to, and each cluster costs Envoy
// more than all else that the edit changes. Whoever does connect there asks. What got an error because the control plane could not be reached is told as
// Unknown when it can be again.
//
// Changes that come while tell is busy are told together, the last one of each destination. It waits for tell, at most a second: Envoy is the
// authority and must not wait for long. tell may call Forget, and must not wait for Ask. A destination that was forgotten a moment ago may be told of
// once more. It is for before [Relay.Register].
func (r *Relay) OnDestinations(tell func(map[netip.AddrPort]Verdict)) { r.teller.tell = tell }

// Forget ends the interest in destinations: the control plane is no longer asked, and Envoy lets go of their clusters, but for those that
// it has asked for itself. It does not wait. A later Ask brings all back before it returns. Who asks about a destination at this moment
// keeps it.
func (r *Relay) Forget(dests []netip.AddrPort) {
	r.forgetting.Lock()
	r.forgotten = append(r.forgotten, dests...)
	r.forgetting.Unlock()
	poke(r.forget)
}

func plain(d netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(d.Addr().Unmap().WithZone(""), d.Port())
}

func (m *machine) ask(dest netip.AddrPort, reply chan answer) {
	dest = plain(dest)
	k, name := m.kind(TypeCluster), onDemandName(dest)
	e := k.entries[name]
	switch {
	case m.down && (e == nil || !e.answered):
		m.unserve(dest)
		reply <- answer{err: errors.New(m.why)}
		return
	case e == nil && len(k.entries) >= m.maxNames:
		reply <- answer{err: fmt.Errorf("%d names are known, as many as are kept", m.maxNames)}
		return
	}
	e = k.entry(name)
	if e.question == nil {
		e.question = &question{dest: dest, waiting: map[chan answer]bool{}}
		m.move(e)
	}
	e.question.waiting[reply] = true
	m.judge(e)
	m.deliver()
}

// leave is for who waits no longer.
func (m *machine) leave(dest netip.AddrPort, reply chan answer) {
	if e := m.kind(TypeCluster).entries[onDemandName(dest)]; e != nil && e.question != nil {
		delete(e.question.waiting, reply)
	}
}

// judge answers a question, as far as an answer is known, or has its change told.
func (m *machine) judge(e *entry) {
	q := e.question
	if q == nil {
		return
	}
	v, err := m.verdict(e)
	if v == Unknown {
		return
	}
	first := q.told == Unknown && len(q.waiting) > 0 // that is an answer, not a change
	q.reply(answer{v == Allowed, err})
	if q.told != v && !first {
		m.news[q.dest] = v
	}
	q.told = v
}

func (q *question) reply(a answer) {
	for w := range q.waiting {
		w <- a
	}
	clear(q.waiting)
}

// verdict is the answer to the question about an on-demand cluster.
func (m *machine) verdict(e *entry) (Verdict, error) {
	r := e.latest
	switch {
	case e.refusal != "" && (r == nil || e.held != r.version):
		return Denied, fmt.Errorf("envoy refuses the cluster %q: %s", e.name, e.refusal)
	case !e.answered:
		return Unknown, nil
	case r != nil && r.unreadable != nil:
		return Denied, r.unreadable
	case !reachable(r), e.doubt:
		return Denied, nil
	case m.envoy == nil, e.held == r.version && e.flight == nil:
		return Allowed, nil
	}
	return Unknown, nil // Envoy is about to ACK it
}

// widens reports whether a resource admits what the agent was told is denied, and Envoy does not ask for it by itself.
func (e *entry) widens(r *resource) bool {
	q := e.question
	return e.onDemand() && q != nil && q.told == Denied && len(q.waiting) == 0 && !e.subscribed && !e.leaving && reachable(r)
}

// abandon tells who waits for the control plane that it cannot be reached.
func (m *machine) abandon() {
	var list []*entry
	for _, e := range m.kind(TypeCluster).sorted() {
		if q := e.question; q != nil && !e.answered {
			if len(q.waiting) > 0 || q.told == Unknown { // also who has given up waiting
				m.unserve(q.dest)
			}
			q.reply(answer{err: errors.New(m.why)})
			if q.told == Unknown { // nobody has an answer that would have to be kept true
				list = append(list, e)
			}
		}
	}
	m.release(list)
}

// unserve notes that a destination is refused for want of a control plane.
func (m *machine) unserve(dest netip.AddrPort) {
	if len(m.unserved) < m.maxNames {
		m.unserved[dest] = true
	}
}

// served is for when the control plane can be reached: what was refused without it is worth asking about again. A control plane that is content with what is
// held says nothing, so its first answer is not waited for. Where it is reached and refuses the pod, what is unknown is asked about, and refused, each time.
func (m *machine) served() {
	for dest := range m.unserved {
		m.news[dest] = Unknown
	}
	clear(m.unserved)
	m.deliver()
}

func (m *machine) forget(dests []netip.AddrPort) {
	k := m.kind(TypeCluster)
	var list []*entry
	for _, dest := range dests {
		delete(m.unserved, plain(dest))
		if e := k.entries[onDemandName(dest)]; e != nil && e.question != nil && len(e.question.waiting) == 0 {
			list = append(list, e)
			delete(m.news, plain(dest))
		}
	}
	m.release(list)
}

// release ends questions: what Envoy has not asked for it lets go of.
func (m *machine) release(list []*entry) {
	var items []item
	for _, e := range list {
		if e.question == nil {
			continue // listed twice
		}
		e.question = nil
		if !e.subscribed {
			if m.envoy != nil && e.present() {
				items = append(items, item{entry: e})
			}
			e.good, e.latest, e.answered, e.untried, e.refusal, e.again = nil, nil, false, false, "", true
		}
		m.move(e)
		e.kind.settle(e)
	}
	if len(items) > 0 {
		slices.SortFunc(items, func(a, b item) int { return strings.Compare(a.entry.name, b.entry.name) })
		m.pass(m.kind(TypeCluster), items, nil, nil)
	}
}
