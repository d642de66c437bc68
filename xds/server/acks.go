package server

import (
	"strings"
	"time"
)

// Refusal is one NACK of one version of one resource.
type Refusal struct {
	Version string // empty: the removal was refused
	Reason  string // the client's own words, cut to 2 KiB
	At      time.Time
}

// maxRefusals is how many refused versions of one resource are remembered; older ones may be tried again.
const maxRefusals = 8

// nacked is a NACK as it goes to the log.
type nacked struct {
	url    string
	names  []string // refused for good
	alone  []string // to be sent again, each by itself
	reason string
}

// acked takes an ACK: the client holds everything in the response.
func (c *client) acked(ts *typeState, f *flight, now time.Time) []Event {
	events := make([]Event, 0, len(f.items))
	for _, it := range f.items {
		e := it.entry
		if e.flight == f {
			e.flight, e.alone = nil, false
		}
		if e.gone || !ts.interested(e) && it.version != "" {
			continue // unsubscribed meanwhile: what it holds is not ours to say
		}
		e.acked, e.ackedAt = it.version, now
		e.confirmed = max(e.confirmed, it.seq)
		ts.accept(e.name, it.version)
		ts.accept(e.name, "") // a removal that was refused may be tried again from here
		ts.mark(e)
		ts.settle(e)
		events = append(events, Event{Kind: Acked, Client: c.name, Type: ts.url, Name: e.name, Version: it.version, Published: it.wanted, Sent: f.at, At: now})
	}
	return events
}

// rejected takes a NACK. Envoy applies what it can of a rejected response and names in the error what it could not; but some
// errors come before anything was applied, and those need not name a resource. So: what the error names is refused; when it
// names none and there were several, each is sent again alone, and the guilty one convicts itself. The others of a rejected
// response are sent again in any case, because Envoy does not remember the versions of a response that it rejected.
func (s *Server) rejected(c *client, ts *typeState, f *flight, reason string, now time.Time) (*nacked, []Event) {
	n := &nacked{url: ts.url, reason: shorten(explanation(reason))}
	if n.reason == "" {
		n.reason = "the client gave no reason"
	}
	var names []string
	for _, it := range f.items {
		names = append(names, it.entry.name)
	}
	guilty := named(reason, names)
	var events []Event
	for _, it := range f.items {
		e := it.entry
		refused := len(f.items) == 1 || guilty[e.name]
		if refused {
			n.names = append(n.names, e.name)
			ts.refuse(e.name, Refusal{it.version, n.reason, now}, s.cfg.MaxSubscriptions)
			events = append(events, Event{Kind: Nacked, Client: c.name, Type: ts.url, Name: e.name, Version: it.version, Reason: n.reason, Published: it.wanted, Sent: f.at, At: now})
		}
		if e.gone || e.flight != f {
			continue
		}
		e.flight, e.alone = nil, false
		e.held = e.acked // what was in force stays in force
		if !refused {
			e.due = e.due || e.explicit
			if len(guilty) == 0 {
				e.alone = true
				n.alone = append(n.alone, e.name)
			}
		}
		ts.mark(e)
		ts.settle(e)
	}
	return n, events
}

// explanation leaves out the dump of the whole resource that Envoy puts before what is wrong with it where a field breaks a constraint:
// "goo.gle/debugproto" (or "debugstr"), the resource in text form, then ": Proto constraint validation failed (…)".
func explanation(reason string) string {
	const end = "\n: "
	if i := strings.LastIndex(reason, end); i >= 0 && strings.HasPrefix(reason, "goo.gle/debug") {
		return reason[i+len(end):]
	}
	return reason
}

// named finds which of the names an error of Envoy's is about. Its forms are "Error adding/updating listener(s) NAME: why",
// one line per listener, "Error adding/updating cluster(s) NAME: why, NAME: why", and "… cluster NAME - NAME: why". A name
// that only occurs within a reason does not count.
func named(reason string, names []string) map[string]bool {
	rest, ok := strings.CutPrefix(reason, "Error adding/updating ")
	if !ok {
		return nil
	}
	_, rest, ok = strings.Cut(rest, " ")
	if !ok {
		return nil
	}
	found := map[string]bool{}
	for _, name := range names {
		is := name + ": "
		if strings.HasPrefix(rest, is) || strings.HasPrefix(rest, name+" - ") || strings.Contains(rest, "\n"+is) || strings.Contains(rest, ", "+is) {
			found[name] = true
		}
	}
	return found
}

func (ts *typeState) refuse(name string, r Refusal, most int) {
	if ts.refusals == nil {
		ts.refusals = map[string][]Refusal{}
	}
	if len(ts.refusals) >= most && ts.refusals[name] == nil {
		for other := range ts.refusals { // any: this many refusals are no longer about single resources
			delete(ts.refusals, other)
			break
		}
	}
	ts.accept(name, r.Version)
	list := append(ts.refusals[name], r)
	ts.refusals[name] = list[max(0, len(list)-maxRefusals):]
}

// accept forgets the refusal of a version that the client has accepted after all.
func (ts *typeState) accept(name, version string) {
	list := ts.refusals[name]
	for i := range list {
		if list[i].Version != version {
			continue
		}
		if list = append(list[:i:i], list[i+1:]...); len(list) == 0 {
			delete(ts.refusals, name)
		} else {
			ts.refusals[name] = list
		}
		return
	}
}

// refusal returns the NACK of a version, if there was one.
func (ts *typeState) refusal(name, version string) *Refusal {
	for i := range ts.refusals[name] {
		if ts.refusals[name][i].Version == version {
			return &ts.refusals[name][i]
		}
	}
	return nil
}
