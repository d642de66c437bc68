package server

import (
	"sync"
	"time"
)

// client is what the server knows of one sidecar: what it should hold, what it said that it holds, and its stream.
// Everything in it is guarded by mu, which is never held while sending, resolving or calling out.
type client struct {
	name Client
	mu   sync.Mutex

	published bool // Publish was called: until then nothing is answered
	forgotten bool
	set       Set
	seq       uint64 // counts changes of what is wanted
	types     map[string]*typeState
	explicit  int // names subscribed to on the current stream

	stream      *stream // nil: not connected
	connectedAt time.Time
	changed     chan struct{} // closed when the ledger moves; nil while nobody waits
}

// typeState is one resource type of a client.
type typeState struct {
	url      string
	entries  map[string]*entry
	pending  map[string]*entry    // what the next plan has to look at; nil: nothing, which is so nearly always
	refusals map[string][]Refusal // NACKed versions by name; outlives entries and streams
	counters Counters

	// Of the current stream:
	asked     bool // the client sent a request of this type
	wildcard  bool
	answerDue bool                // a wildcard request is to be answered, though it be with nothing
	refused   map[string]struct{} // names past a limit, to be answered as removed
}

// entry is one resource of a client: wanted, subscribed to, or both.
type entry struct {
	name     string
	static   *Resource // from the published set
	demanded *Resource // resolved on demand
	stale    bool      // to be resolved (again)
	gone     bool      // no longer in typeState.entries

	seq       uint64 // of the last change of what is wanted here
	confirmed uint64 // the client holds what was wanted at this seq
	wantedAt  time.Time
	sentAt    time.Time
	ackedAt   time.Time
	acked     string // version that the client said it holds; empty: none

	// Of the current stream:
	explicit bool    // subscribed to by name
	due      bool    // the client waits for an answer, whatever it holds
	alone    bool    // it was in a response that was NACKed without saying for whose sake: it gets one of its own
	held     string  // acked, or what is on its way
	flight   *flight // the last response that carried it, until its ACK
}

// flight is a response that was planned and not yet ACKed.
type flight struct {
	nonce string
	url   string
	at    time.Time
	items []item
}

// item is one resource in a flight.
type item struct {
	entry   *entry
	version string // empty: removed
	seq     uint64
	wanted  time.Time
}

func newClient(name Client) *client {
	return &client{name: name, types: map[string]*typeState{}}
}

func (c *client) typeState(url string) *typeState {
	ts := c.types[url]
	if ts == nil {
		ts = &typeState{url: url, entries: map[string]*entry{}}
		c.types[url] = ts
	}
	return ts
}

func (ts *typeState) entry(name string) *entry {
	e := ts.entries[name]
	if e == nil {
		e = &entry{name: name}
		ts.entries[name] = e
	}
	return e
}

// wanted is what the client should hold under this name; nil: nothing.
func (e *entry) wanted() *Resource {
	switch {
	case e.static != nil:
		return e.static
	case e.explicit:
		return e.demanded
	}
	return nil
}

func (e *entry) wantedVersion() string {
	if r := e.wanted(); r != nil {
		return r.Version
	}
	return ""
}

func (ts *typeState) interested(e *entry) bool {
	return e.explicit || ts.wildcard && e.static != nil
}

// mark has the next plan look at an entry.
func (ts *typeState) mark(e *entry) {
	if !ts.asked {
		return
	}
	if ts.pending == nil {
		ts.pending = map[string]*entry{}
	}
	ts.pending[e.name] = e
}

// publish takes a new set and reports whether anything is different, and whether the client is still known.
func (c *client) publish(set Set, now time.Time) (different, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.forgotten {
		return false, false
	}
	first := !c.published
	if !first && set == c.set {
		return false, true
	}
	c.published = true
	seq := c.seq + 1
	for d := range c.set.changes(set) {
		different = true
		if d.after == nil {
			c.want(d.before.Type, d.before.Name, nil, seq, now)
		} else {
			c.want(d.after.Type, d.after.Name, d.after, seq, now)
		}
	}
	c.set = set
	if different {
		c.seq = seq
	}
	if different || first {
		c.wake()
	}
	return different || first, true
}

func (c *client) want(url, name string, r *Resource, seq uint64, now time.Time) {
	ts := c.typeState(url)
	e := ts.entry(name)
	e.static, e.seq, e.wantedAt = r, seq, now
	e.stale = r == nil && e.explicit && url == ClusterType // it may yet exist on demand
	ts.mark(e)
	ts.settle(e)
}

// refresh marks subscribed names to be resolved again.
func (c *client) refresh(names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ts := c.types[ClusterType]
	if ts == nil {
		return
	}
	found := false
	for _, name := range names {
		if e := ts.entries[name]; e != nil && e.explicit && e.static == nil {
			if !found {
				c.seq++
			}
			found, e.stale, e.seq = true, true, c.seq
			ts.mark(e)
		}
	}
	if found {
		c.wake()
	}
}

// settle notes that the client holds what is wanted, if it does, and drops an entry that is of no use any more.
func (ts *typeState) settle(e *entry) {
	if e.flight != nil || e.stale {
		return
	}
	if e.wantedVersion() == e.held { // with nothing on its way that is what was ACKed
		e.confirmed = e.seq
	}
	if e.static == nil && !e.explicit && e.held == "" && !e.due {
		e.gone = true
		delete(ts.entries, e.name)
		delete(ts.pending, e.name)
	}
}

// wake has the stream's sender plan, if there is a stream.
func (c *client) wake() {
	if c.stream != nil {
		c.stream.wake()
	}
}

// moved tells those who wait that the ledger moved.
func (c *client) moved() {
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}
