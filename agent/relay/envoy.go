package relay

import (
	"errors"
	"fmt"
	"strings"
)

// envoySide is Envoy's stream.
type envoySide struct {
	send    func([]byte) // queues a message
	end     func(error)  // ends the stream
	session *session
	flights map[string]*flight // by nonce
	bytes   int                // of what is in flights
}

// flight is a response to Envoy that has no answer yet.
type flight struct {
	kind  *kind
	items []item
	bytes int
	// What it passes on; nil: it is the relay's own, and its answer stays here.
	of *delivery
}

// item is a resource of a flight; nil: the name is removed.
type item struct {
	entry    *entry
	resource *resource
	denial   *resource // the cluster without endpoints in whose place the name is removed; nil: it is gone
}

// good is what the entry has when Envoy has ACKed the item.
func (it item) good() *resource {
	if it.denial != nil {
		return it.denial
	}
	return it.resource
}

// envoyComes begins a stream of Envoy's, in the place of any that there was.
func (m *machine) envoyComes(side *envoySide) {
	if before := m.envoy; before != nil {
		before.end(errors.New("displaced by a newer stream"))
		m.envoyGoes(before)
	}
	side.session, side.flights = m.ledger.stream(), map[string]*flight{}
	m.envoy = side
}

// envoyGoes ends one. What it has not answered nobody will; what was good stays so, for the next.
//
// The control plane's stream is begun anew without what Envoy had asked for: so there too nothing is in force that no Envoy holds, and no
// response waits for an answer that does not come.
func (m *machine) envoyGoes(side *envoySide) {
	if m.envoy != side {
		return
	}
	m.envoy = nil
	again := false
	for _, k := range m.ranked() {
		again = again || k.asked && k.open
		k.asked, k.wildcard, k.unanswered = false, false, 0
		for _, e := range k.sorted() {
			if e.onDemand() && e.question == nil && !reachable(e.good) {
				e.good = nil // nobody asks for it any more
			}
			onItsWay := e.latest != e.good
			e.held, e.sent, e.maybe, e.doubt, e.flight, e.subscribed, e.due = "", "", false, false, nil, false, false
			e.refusal, e.latest = "", e.good
			e.answered = e.good != nil || e.answered && e.question != nil && !onItsWay
			m.changed(e)
		}
	}
	if again {
		m.restart()
	}
	m.deliver()
}

// fromEnvoy takes a request. An error ends Envoy's stream.
func (m *machine) fromEnvoy(r request) error {
	if r.typeURL == "" {
		return errors.New("envoy sent a request without a type")
	}
	if m.kinds[r.typeURL] == nil && len(m.kinds) >= maxKinds {
		return fmt.Errorf("envoy asks for more than %d types", maxKinds)
	}
	k := m.kind(r.typeURL)
	first, all := !k.asked, false
	if first {
		k.asked = true
		m.envoy.session.introduce(k.url, r.held)
		for name, v := range r.held {
			e := k.entry(name)
			e.held, e.sent = v, v
		}
		all = len(r.subscribe) == 0 && (k.url == TypeListener || k.url == TypeCluster) // the protocol's older way of saying "*"
	}
	if r.nonce != "" {
		if f := m.envoy.flights[r.nonce]; f != nil && f.kind == k {
			m.landed(r.nonce, f, r)
		} else {
			m.logger.Warn("relay: envoy answers a response that it was not sent", "type", shortType(k.url), "nonce", r.nonce)
		}
	}
	for _, name := range r.unsubscribe {
		m.envoyUnsubscribes(k, name)
	}
	var beyond []string
	for _, name := range r.subscribe {
		switch _, listed := r.held[name]; {
		case name == "*":
			all = true
		case k.entries[name] == nil && len(k.entries) >= m.maxNames:
			beyond = append(beyond, name)
		default:
			e := k.entry(name)
			e.subscribed, e.due = true, !listed || !first || e.good == nil || e.held != e.good.version
			m.move(e)
		}
	}
	if len(beyond) > 0 {
		m.logger.Warn("relay: envoy asks for more names than are kept; refused", "type", shortType(k.url), "count", len(beyond), "first", beyond[0])
		m.pass(k, nil, beyond, nil)
	}
	k.wildcard = k.wildcard || all
	m.serve(k, all)
	m.wakePlane()
	m.deliver()
	return nil
}

func (m *machine) envoyUnsubscribes(k *kind, name string) {
	if name == "*" {
		k.wildcard = false
		return
	}
	if e := k.entries[name]; e != nil && e.subscribed {
		e.subscribed, e.due = false, k.wildcard // below a wildcard it cannot know whether the name is part of that
		if !k.wildcard {
			e.held, e.sent = "", ""
		}
		m.move(e)
	}
}

// serve sends Envoy what is here of what it waits for, and, when it has just asked for all, all that is good.
func (m *machine) serve(k *kind, all bool) {
	if m.envoy == nil || !k.asked {
		return
	}
	var items []item
	for _, e := range k.sorted() {
		r := e.forEnvoy()
		switch {
		case e.flight != nil: // which is newer, and answers
		case r != nil && (e.due || all && e.sent != r.version):
			items = append(items, item{entry: e, resource: r})
		case r == nil && e.due && (m.down && e.onDemand() || e.answered && e.latest == nil || !e.subscribed):
			items = append(items, item{entry: e})
		case r == nil && all && k.complete && e.sent != "":
			items = append(items, item{entry: e})
		}
	}
	if len(items) > 0 || all && k.complete {
		m.pass(k, items, nil, nil)
	}
}

// pass sends Envoy a response: items, and names beside them that are unknown.
func (m *machine) pass(k *kind, items []item, unknown []string, of *delivery) {
	f := &flight{kind: k, items: items, of: of}
	r := response{typeURL: k.url, nonce: m.nonce(), removed: unknown}
	for _, it := range items {
		e := it.entry
		e.flight, e.sent, e.due = f, version(it.resource), false
		if it.resource != nil {
			r.resources = append(r.resources, it.resource)
		} else {
			r.removed = append(r.removed, e.name)
		}
	}
	message := r.message()
	f.bytes = len(message)
	m.envoy.flights[r.nonce] = f
	m.envoy.bytes += f.bytes
	k.unanswered++
	m.envoy.send(message)
}

// tend ends the stream of an Envoy that leaves too much unanswered. It is to be called after each event.
func (m *machine) tend() {
	side := m.envoy
	if side == nil {
		return
	}
	if n := len(side.flights); n > maxUnanswered || n > 1 && side.bytes > m.maxBytes {
		err := fmt.Errorf("envoy has left %d responses of %d bytes unanswered", n, side.bytes)
		m.logger.Error("relay: ending envoy's stream", "reason", err)
		side.end(err)
		m.envoyGoes(side)
	}
}

// landed takes Envoy's answer to a response.
func (m *machine) landed(nonce string, f *flight, r request) {
	delete(m.envoy.flights, nonce)
	m.envoy.bytes -= f.bytes
	f.kind.unanswered--
	var names, removed []string
	for _, it := range f.items {
		if it.resource != nil {
			names = append(names, it.entry.name)
		} else {
			removed = append(removed, it.entry.name)
		}
	}
	if r.nack() {
		m.envoy.session.refuse(f.kind.url, append(names, removed...), r.reason)
		m.refused(f, r.reason)
	} else {
		m.envoy.session.accept(f.kind.url, names, removed)
		m.accepted(f)
	}
	if f.of != nil {
		f.kind.complete = f.kind.complete || f.kind.wildcard
		m.answer(f.of, r.refusal)
	}
}

func (m *machine) accepted(f *flight) {
	for _, it := range f.items {
		e := it.entry
		e.held, e.due = version(it.resource), false // what it asked for before it ACKed, this has answered
		if e.flight == f {
			e.flight, e.maybe, e.doubt = nil, false, false
			if it.resource != nil || f.of != nil {
				e.refusal = ""
			}
		}
		e.untried = e.untried && it.resource != e.good
		if f.of != nil && (it.good() == nil || f.kind.wildcard && !e.onDemand() || e.wanted()) { // else it was forgotten meanwhile
			e.good = it.good()
		}
		if it.denial != nil && e.flight == nil && e.good == it.denial {
			m.withdrawn(e)
		}
		m.changed(e)
	}
}

// withdrawn is for a denied cluster that Envoy has let go of.
func (m *machine) withdrawn(e *entry) {
	switch {
	case e.subscribed: // it has asked while the removal was on its way to it, and would let each connection wait for a cluster
		m.pass(e.kind, []item{{entry: e, resource: e.good}}, nil, nil)
	case e.question == nil: // nobody follows it
		e.good, e.latest, e.answered = nil, nil, false
	}
}

// refused leaves Envoy with what it had, as far as one knows: it applies of a refused response what it can. The control plane sends the
// innocent once more. What it denied stays denied until then.
func (m *machine) refused(f *flight, reason string) {
	for _, it := range f.items {
		e := it.entry
		e.maybe = it.resource != nil
		e.doubt = e.doubt || e.onDemand() && !reachable(it.resource)
		if e.flight == f {
			e.flight, e.sent = nil, e.held
			if len(f.items) == 1 || strings.Contains(reason, e.name) {
				e.refusal = reason
			}
			switch {
			case f.of == nil:
				m.refusedGood(e, f, it.resource)
			case !e.onDemand() || reachable(it.resource):
				e.latest, e.answered = e.good, e.good != nil
			}
		}
		m.changed(e)
	}
}

// refusedGood is for what an Envoy refuses that starts anew, and another has held: it gets each by itself, so that the one does not keep the
// others away. What none has ever held is good no longer: the control plane, which was told that it is held, is to send it once more.
func (m *machine) refusedGood(e *entry, f *flight, r *resource) {
	switch {
	case r == nil || e.forEnvoy() != r:
	case len(f.items) > 1:
		m.pass(f.kind, []item{{entry: e, resource: r}}, nil, nil)
	case e.untried:
		e.good, e.latest, e.answered, e.untried, e.again = nil, nil, false, false, true
		m.move(e)
	}
}
