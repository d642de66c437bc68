package server

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
)

// rank is the order of types within one plan. First what is not for Envoy: the agent holds open connections against it, and must not
// hold one that newer policy let pass against an older one. Then what is pointed at before what points at it.
func rank(typeURL string) int {
	switch typeURL {
	case ClusterType:
		return 1
	case ExtensionType:
		return 2
	case ListenerType:
		return 3
	}
	return 0
}

// planned is one response, ready to be sent.
type planned struct {
	response *discoveryv3.DeltaDiscoveryResponse
	flight   *flight
}

// planner computes what a client is to be sent now: the difference between what it should hold and what it holds or has on
// its way. Everything planned counts as on its way.
type planner struct {
	c       *client
	st      *stream
	cfg     *Config
	now     time.Time
	out     []planned
	retryIn time.Duration // when something waits for an ACK: how long to be patient; 0: nothing waits
}

// plan returns the responses to send, in order: additions from clusters to listeners, then removals from listeners to
// clusters. It returns none before the first Publish. retryIn is when to plan again without being woken; 0: not.
func (c *client) plan(st *stream, cfg *Config) (out []planned, retryIn time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stream != st || !c.published {
		return nil, 0
	}
	p := &planner{c: c, st: st, cfg: cfg, now: cfg.Now()}
	var types []*typeState
	for _, ts := range c.types {
		if ts.asked && (len(ts.pending) > 0 || ts.answerDue || len(ts.refused) > 0) {
			types = append(types, ts)
		}
	}
	slices.SortFunc(types, func(a, b *typeState) int {
		return cmp.Or(cmp.Compare(rank(a.url), rank(b.url)), strings.Compare(a.url, b.url))
	})
	removals := make([][]*entry, len(types))
	for i, ts := range types {
		removals[i] = p.additions(ts)
	}
	for i, ts := range slices.Backward(types) {
		p.removals(ts, removals[i])
	}
	for _, ts := range types {
		if ts.answerDue && p.room() {
			p.answer(ts)
		}
	}
	for _, ts := range types {
		if len(ts.pending) == 0 {
			ts.pending = nil
		}
	}
	if len(p.out) > 0 {
		c.moved()
	}
	return p.out, p.retryIn
}

// additions plans what of a type is new or changed and returns what is to be removed.
func (p *planner) additions(ts *typeState) (remove []*entry) {
	var add, alone []*entry
	for _, e := range sorted(ts.pending) {
		if e.stale || p.waits(e.flight) {
			continue // looked at again when resolved, ACKed or out of patience
		}
		r := e.wanted()
		switch {
		case !ts.interested(e):
			r = nil
		case r != nil && ts.refusal(e.name, r.Version) != nil:
			// Never again with the same bytes. Who asks and holds no older version learns that there is nothing.
			if !e.due || e.held != "" {
				e.due = false
				p.drop(ts, e)
				continue
			}
			r = nil
		}
		switch {
		case r == nil && (e.due || e.held != "" && (e.explicit || ts.wildcard) && ts.refusal(e.name, "") == nil):
			remove = append(remove, e)
		case r == nil && (e.explicit || ts.wildcard):
			p.drop(ts, e)
		case r == nil: // the client dropped it when it unsubscribed
			e.held, e.acked, e.confirmed = "", "", 0
			p.drop(ts, e)
		case e.held == r.Version && !e.due:
			p.drop(ts, e)
		case e.alone:
			alone = append(alone, e)
		default:
			add = append(add, e)
		}
	}
	for len(add) > 0 && p.room() {
		n, size := 0, 0
		for n < len(add) && (n == 0 || size+add[n].wanted().size() <= p.cfg.MaxResponseBytes) {
			size += add[n].wanted().size()
			n++
		}
		p.add(ts, add[:n])
		add = add[n:]
	}
	for len(alone) > 0 && p.room() {
		p.add(ts, alone[:1])
		alone = alone[1:]
	}
	return remove
}

func (p *planner) add(ts *typeState, entries []*entry) {
	resp, f := p.take(ts)
	for _, e := range entries {
		r := e.wanted()
		resp.Resources = append(resp.Resources, r.wire)
		p.load(ts, f, e, r.Version)
	}
}

// removals plans removals, and the answers to who asks for something that does not exist. A cluster that a listener may
// still point at is removed when no listener is on its way any more.
func (p *planner) removals(ts *typeState, entries []*entry) {
	entries = slices.DeleteFunc(entries, func(e *entry) bool {
		return ts.url == ClusterType && !e.explicit && e.held != "" && p.listenersMove()
	})
	if len(entries)+len(ts.refused) == 0 || !p.room() {
		return
	}
	resp, f := p.take(ts)
	for _, e := range entries {
		resp.RemovedResources = append(resp.RemovedResources, e.name)
		p.load(ts, f, e, "")
	}
	resp.RemovedResources = append(resp.RemovedResources, sortedNames(ts.refused)...)
	ts.refused = nil
}

// answer plans the response that a wildcard request gets when there is nothing to say: else Envoy waits out its timeout.
func (p *planner) answer(ts *typeState) { p.take(ts) }

// take starts a response.
func (p *planner) take(ts *typeState) (*discoveryv3.DeltaDiscoveryResponse, *flight) {
	p.st.sequence++
	f := &flight{nonce: fmt.Sprintf("%s-%d", p.st.id, p.st.sequence), url: ts.url, at: p.now}
	p.st.flights[f.nonce] = f
	resp := &discoveryv3.DeltaDiscoveryResponse{TypeUrl: ts.url, Nonce: f.nonce}
	p.out = append(p.out, planned{resp, f})
	ts.answerDue = false
	return resp, f
}

// load puts an entry on a flight.
func (p *planner) load(ts *typeState, f *flight, e *entry, version string) {
	seq := e.seq
	if version != e.wantedVersion() {
		seq = 0 // an answer, not what was published: its ACK confirms nothing
	}
	f.items = append(f.items, item{e, version, seq, e.wantedAt})
	e.flight, e.held, e.due, e.sentAt = f, version, false, p.now
	delete(ts.pending, e.name)
}

// drop notes that there is nothing to do for an entry.
func (p *planner) drop(ts *typeState, e *entry) {
	delete(ts.pending, e.name)
	before := e.confirmed
	ts.settle(e)
	if e.gone || e.confirmed != before {
		p.c.moved()
	}
}

// waits reports whether something has to wait for the ACK of a flight.
func (p *planner) waits(f *flight) bool {
	if f == nil {
		return false
	}
	left := p.cfg.AckPatience - p.now.Sub(f.at)
	if left <= 0 {
		return false
	}
	if p.retryIn == 0 || left < p.retryIn {
		p.retryIn = left
	}
	return true
}

// room reports whether another response may be on its way. If not, the next ACK wakes the sender.
func (p *planner) room() bool { return len(p.st.flights) < maxFlights }

func (p *planner) listenersMove() bool {
	for _, f := range p.st.flights {
		if f.url == ListenerType && len(f.items) > 0 && p.waits(f) {
			return true
		}
	}
	return false
}

func sorted(entries map[string]*entry) []*entry {
	list := make([]*entry, 0, len(entries))
	for _, e := range entries {
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b *entry) int { return strings.Compare(a.name, b.name) })
	return list
}

func sortedNames(set map[string]struct{}) []string {
	list := make([]string, 0, len(set))
	for name := range set {
		list = append(list, name)
	}
	slices.Sort(list)
	return list
}
