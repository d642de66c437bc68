package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Ledger answers what sidecars said of what they were sent. It is a view of a Server.
type Ledger struct{ s *Server }

// Ledger returns the server's ledger.
func (s *Server) Ledger() *Ledger { return &Ledger{s} }

// What Wait may find.
var (
	ErrNotPublished = errors.New("nothing was published for this client")
	ErrForgotten    = errors.New("the client was forgotten: its pod is gone")
	ErrNotConnected = errors.New("the client is not connected")
	ErrNotConfirmed = errors.New("the client has not confirmed everything")
)

// RefusedError is a NACK.
type RefusedError struct {
	Client     Client
	Type, Name string
	Refusal    Refusal
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("sidecar %s refused %s %q: %s", e.Client, short(e.Type), e.Name, e.Refusal.Reason)
}

// EventKind says what happened to a resource.
type EventKind uint8

// What happens to a resource, in this order.
const (
	Sent EventKind = iota + 1
	Acked
	Nacked
)

// Event is one resource sent to, or answered by, one client. At minus Published is the time from publishing to the answer.
type Event struct {
	Kind       EventKind
	Client     Client
	Type, Name string
	Version    string // empty: removed
	Reason     string // of a NACK
	Published  time.Time
	Sent       time.Time
	At         time.Time
}

// ClientStatus is one sidecar in the ledger.
type ClientStatus struct {
	Client    Client
	Connected bool
	Since     time.Time // of the connection
	InForce   bool      // connected, and everything wanted was confirmed
	Resources []ResourceStatus
	Counters  map[string]Counters // by type URL
}

// ResourceStatus is one resource of one sidecar. The zero time: never.
type ResourceStatus struct {
	Type, Name string
	Wanted     string // version; empty: it should not exist
	Acked      string // version that the client said it holds, on this connection or the last; empty: none
	Subscribed bool   // the client asked for it on this connection
	InForce    bool   // what is wanted was confirmed on this connection
	WantedAt   time.Time
	SentAt     time.Time
	AckedAt    time.Time
	Refusal    *Refusal // of the wanted version
}

// Wait returns when the client has confirmed everything that was published for it at the time of the call, or something newer
// in its place. A NACK ends it with a *RefusedError. A client that is not connected may connect until the context ends; the
// error then says what was missing (ErrNotConnected or ErrNotConfirmed, and the context's error). A resource that the client
// never asks for is never confirmed; an on-demand name that it no longer asks for is no longer waited for.
func (l *Ledger) Wait(ctx context.Context, name Client) error {
	c := l.s.lookup(name)
	if c == nil {
		return fmt.Errorf("wait for %s: %w", name, ErrNotPublished)
	}
	c.mu.Lock()
	if !c.published {
		c.mu.Unlock()
		return fmt.Errorf("wait for %s: %w", name, ErrNotPublished)
	}
	var open []target
	for _, ts := range c.types {
		for _, e := range ts.entries {
			open = append(open, target{ts, e, e.seq})
		}
	}
	for {
		var err error
		open, err = c.outstanding(open)
		connected := c.stream != nil
		if err != nil || connected && len(open) == 0 {
			c.mu.Unlock()
			return err
		}
		if c.changed == nil {
			c.changed = make(chan struct{})
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			if !connected {
				return fmt.Errorf("wait for %s: %w: %w", name, ErrNotConnected, ctx.Err())
			}
			c.mu.Lock()
			missing := describe(open)
			c.mu.Unlock()
			return fmt.Errorf("wait for %s: %w (%s): %w", name, ErrNotConfirmed, missing, ctx.Err())
		}
		c.mu.Lock()
	}
}

// target is one thing that Wait waits for.
type target struct {
	ts    *typeState
	entry *entry
	seq   uint64
}

// outstanding returns what is not confirmed yet. While the client is away nothing is confirmed, and nothing refused for good.
func (c *client) outstanding(targets []target) (open []target, err error) {
	if c.forgotten {
		return nil, fmt.Errorf("wait for %s: %w", c.name, ErrForgotten)
	}
	for _, t := range targets {
		e := t.entry
		if e.gone || e.confirmed >= t.seq {
			continue
		}
		if r := t.ts.refusal(e.name, e.wantedVersion()); r != nil && t.ts.asked {
			return nil, &RefusedError{c.name, t.ts.url, e.name, *r}
		}
		open = append(open, t)
	}
	return open, nil
}

func describe(open []target) string {
	var names []string
	for _, t := range open {
		what := "not acknowledged"
		switch {
		case t.entry.flight != nil:
		case !t.ts.interested(t.entry):
			what = "not subscribed to"
		}
		names = append(names, fmt.Sprintf("%s %q %s", short(t.ts.url), t.entry.name, what))
	}
	slices.Sort(names)
	if len(names) > 5 {
		names = append(names[:5], fmt.Sprintf("and %d more", len(names)-5))
	}
	return strings.Join(names, ", ")
}

// short is the last part of a type URL.
func short(typeURL string) string { return typeURL[strings.LastIndexByte(typeURL, '.')+1:] }

// InForce reports whether the client is connected and confirmed these very bytes as the last of their name.
func (l *Ledger) InForce(name Client, r *Resource) bool {
	c := l.s.lookup(name)
	if c == nil {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	ts := c.types[r.Type]
	if ts == nil || !ts.asked {
		return false
	}
	e := ts.entries[r.Name]
	return e != nil && e.acked == r.Version
}

// Status returns one client, and whether it is known.
func (l *Ledger) Status(name Client) (ClientStatus, bool) {
	c := l.s.lookup(name)
	if c == nil {
		return ClientStatus{}, false
	}
	return c.status(), true
}

// Snapshot returns all clients, sorted. Each is consistent in itself.
func (l *Ledger) Snapshot() []ClientStatus {
	l.s.mu.RLock()
	clients := slices.Collect(maps.Values(l.s.clients))
	l.s.mu.RUnlock()
	list := make([]ClientStatus, len(clients))
	for i, c := range clients {
		list[i] = c.status()
	}
	slices.SortFunc(list, func(a, b ClientStatus) int { return strings.Compare(string(a.Client), string(b.Client)) })
	return list
}

func (c *client) status() ClientStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	cs := ClientStatus{Client: c.name, Connected: c.stream != nil, Counters: map[string]Counters{}}
	if cs.Connected {
		cs.Since = c.connectedAt
	}
	cs.InForce = cs.Connected && c.published
	n := 0
	for _, ts := range c.types {
		n += len(ts.entries)
	}
	cs.Resources = make([]ResourceStatus, 0, n)
	for url, ts := range c.types {
		if ts.counters != (Counters{}) {
			cs.Counters[url] = ts.counters
		}
		for _, e := range ts.entries {
			r := ResourceStatus{
				Type: url, Name: e.name, Wanted: e.wantedVersion(), Acked: e.acked,
				Subscribed: ts.asked && ts.interested(e),
				InForce:    e.confirmed >= e.seq,
				WantedAt:   e.wantedAt, SentAt: e.sentAt, AckedAt: e.ackedAt,
			}
			if refusal := ts.refusal(e.name, r.Wanted); refusal != nil && !r.InForce {
				copied := *refusal
				r.Refusal = &copied
			}
			cs.InForce = cs.InForce && r.InForce
			cs.Resources = append(cs.Resources, r)
		}
	}
	slices.SortFunc(cs.Resources, func(a, b ResourceStatus) int {
		return cmp.Or(strings.Compare(a.Type, b.Type), strings.Compare(a.Name, b.Name))
	})
	return cs
}

// Counters count responses, what was in them, and what came back. They only grow.
type Counters struct {
	Responses, Resources, Removals, Bytes uint64 // sent
	Acks, Nacks                           uint64 // received, per response
}

func (c *Counters) add(d Counters) {
	c.Responses += d.Responses
	c.Resources += d.Resources
	c.Removals += d.Removals
	c.Bytes += d.Bytes
	c.Acks += d.Acks
	c.Nacks += d.Nacks
}

// totals are the Counters of all clients that ever were, by type.
type totals struct {
	mu     sync.Mutex
	byType map[string]*Counters
}

func (t *totals) add(typeURL string, d Counters) {
	if d == (Counters{}) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.byType == nil {
		t.byType = map[string]*Counters{}
	}
	if t.byType[typeURL] == nil {
		t.byType[typeURL] = &Counters{}
	}
	t.byType[typeURL].add(d)
}

// Totals returns the counters by type URL, over all clients, those forgotten included.
func (l *Ledger) Totals() map[string]Counters {
	l.s.totals.mu.Lock()
	defer l.s.totals.mu.Unlock()
	out := make(map[string]Counters, len(l.s.totals.byType))
	for url, c := range l.s.totals.byType {
		out[url] = *c
	}
	return out
}
