package relay

import (
	"fmt"
	"maps"
	"slices"
)

// planeSide is the stream to the control plane.
type planeSide struct {
	wake    func() // has requests called
	end     func() // ends the stream; another is begun
	answers []request
	nonces  map[string]bool // of responses that were not answered yet
}

// delivery is a response of the control plane's that waits for its answer.
type delivery struct {
	side           *planeSide
	typeURL, nonce string
}

// planeComes begins a stream.
func (m *machine) planeComes(side *planeSide) {
	m.forgetStream()
	side.nonces = map[string]bool{}
	m.plane, m.down, m.why = side, false, ""
	m.served()
	side.wake()
}

// planeGoes ends one. What Envoy was sent it may still answer; the next stream then says that it is held.
func (m *machine) planeGoes(side *planeSide) {
	if m.plane == side {
		m.plane = nil
		m.forgetStream()
	}
}

// restart ends the stream, for the next to say what is held: the protocol has no other place for that than a stream's first requests.
func (m *machine) restart() {
	if side := m.plane; side != nil {
		m.planeGoes(side)
		side.end()
	}
}

// forgetStream forgets what was true of a stream only.
func (m *machine) forgetStream() {
	for _, k := range m.kinds {
		k.open, k.wildcarded = false, false
		clear(k.moved)
		for _, e := range k.entries {
			e.listed, e.again, e.leaving = false, false, false
			k.settle(e)
		}
	}
}

// planeIsDown is for when an attempt has failed: who waits for an answer is told that there is none.
func (m *machine) planeIsDown(why string) {
	m.down, m.why = true, why
	for _, k := range m.ranked() {
		m.serve(k, false)
	}
	m.abandon()
	m.deliver()
}

// fromPlane takes a response. An error ends the stream.
func (m *machine) fromPlane(side *planeSide, r response) error {
	if m.plane != side {
		return nil // ended; the next stream says what is held
	}
	k := m.kinds[r.typeURL]
	switch {
	case r.nonce == "" || side.nonces[r.nonce]:
		return fmt.Errorf("the control plane sent a response with the nonce %q, empty or in use", r.nonce)
	case k == nil || !k.open:
		return fmt.Errorf("the control plane sent a response of type %q, which was not asked for", r.typeURL)
	}
	for _, res := range r.resources {
		if res.name == "" || res.version == "" || res.typeURL != r.typeURL {
			return fmt.Errorf("the control plane sent the resource %q, version %q, type %q, in a response of type %q", res.name, res.version, res.typeURL, r.typeURL)
		}
	}
	side.nonces[r.nonce] = true
	of := &delivery{side, r.typeURL, r.nonce}
	var items []item // for Envoy
	var widened []*entry
	for _, res := range r.resources {
		if e := k.entries[res.name]; e != nil && e.widens(res) {
			m.news[e.question.dest] = Unknown
			widened = append(widened, e)
			continue
		}
		items = m.take(k, res.name, res, items)
	}
	for _, name := range r.removed {
		items = m.take(k, name, nil, items)
	}
	m.deliver() // what is denied, before Envoy hears of it
	m.release(widened)
	if empty := len(r.resources)+len(r.removed) == 0; len(items) > 0 || empty && m.envoy != nil && k.asked {
		m.pass(k, items, nil, of)
		return nil
	}
	m.answer(of, nil)
	m.wakePlane()
	return nil
}

// take notes a resource, or that there is none (nil), and appends it to items where Envoy has a part in it.
func (m *machine) take(k *kind, name string, r *resource, items []item) []item {
	e := k.entries[name]
	switch {
	case e == nil && (r == nil || onDemand(k.url, name)):
		return items // gone meanwhile
	case e == nil:
		e = k.entry(name)
	case e.leaving:
		if r == nil {
			e.leaving = false
			m.move(e)
		}
		return items
	}
	if e.onDemand() && !e.wanted() && !e.present() {
		return items // forgotten, and this was on its way
	}
	e.latest, e.answered, e.refusal = r, true, ""
	switch {
	case m.envoy == nil || !k.asked, // Envoy has no part in it
		r == nil && !e.present() && !e.due,
		r != nil && e.sent == r.version && e.held == r.version && !e.maybe && !e.due,
		e.onDemand() && !e.subscribed && !e.present() && !reachable(r):
		e.good, e.untried = r, m.envoy == nil || !k.asked
		m.changed(e)
		return items
	}
	m.judge(e)
	if r != nil && e.onDemand() && !e.subscribed && !reachable(r) {
		// Envoy, which has not asked for the name itself, lets go of the cluster: that costs it a third of taking one without endpoints. Should it ask,
		// it gets that.
		return append(items, item{entry: e, denial: r})
	}
	return append(items, item{entry: e, resource: r})
}

// answer has a response of the control plane's ACKed, or NACKed with Envoy's words.
func (m *machine) answer(of *delivery, refusal []byte) {
	if m.plane != of.side {
		return
	}
	delete(of.side.nonces, of.nonce)
	of.side.answers = append(of.side.answers, request{typeURL: of.typeURL, nonce: of.nonce, refusal: refusal})
	of.side.wake()
}

// requests returns what is to be sent to the control plane now, in order.
func (m *machine) requests(side *planeSide) (list [][]byte) {
	if m.plane != side {
		return nil
	}
	for _, r := range side.answers {
		list = append(list, r.message())
	}
	side.answers = nil
	for _, k := range m.ranked() {
		var r request
		switch {
		case !k.open:
			r = m.introduction(k)
		case k.asked && k.wildcard && !k.wildcarded:
			if k.unanswered > 0 {
				continue // what it holds is to be listed
			}
			if m.anythingHeld(k) {
				m.restart()
				return list
			}
			r = m.subscriptions(k)
			r.subscribe = append([]string{"*"}, r.subscribe...)
			k.wildcarded = true
		default:
			r = m.subscriptions(k)
			if k.wildcarded && k.asked && !k.wildcard { // Envoy has said so; when it goes the stream ends
				r.unsubscribe = append(r.unsubscribe, "*")
				k.wildcarded = false
			}
		}
		if len(r.subscribe)+len(r.unsubscribe) > 0 {
			r.typeURL = k.url
			list = append(list, r.message())
		}
	}
	return list
}

// introduction is the first request of a type on a stream: everything that is wanted, and what is held of it. It waits until Envoy has said what
// it holds.
func (m *machine) introduction(k *kind) (r request) {
	if m.envoy != nil && (!k.asked || k.unanswered > 0) {
		return r
	}
	if k.asked && k.wildcard {
		r.subscribe = append(r.subscribe, "*")
		k.wildcarded = true
	}
	for _, e := range k.sorted() {
		wanted := e.wanted()
		if wanted {
			r.subscribe = append(r.subscribe, e.name)
			e.listed = true
		}
		if (wanted || k.wildcarded && !e.onDemand()) && e.holds(m.envoy != nil) {
			if r.held == nil {
				r.held = map[string]string{}
			}
			r.held[e.name] = e.good.version
		}
	}
	clear(k.moved)
	k.open = len(r.subscribe) > 0
	return r
}

// anythingHeld reports whether there is something to list that a wildcard would have sent once more.
func (m *machine) anythingHeld(k *kind) bool {
	for _, e := range k.entries {
		if !e.listed && e.holds(m.envoy != nil) {
			return true
		}
	}
	return false
}

// subscriptions are the names that have come to be wanted, or no longer are.
func (m *machine) subscriptions(k *kind) (r request) {
	for _, name := range slices.Sorted(maps.Keys(k.moved)) {
		e := k.entries[name]
		if e == nil {
			continue
		}
		switch wanted := e.wanted(); {
		case wanted && e.leaving:
			continue // until the control plane has said that it is gone: its answer could be taken for this one's
		case wanted && (!e.listed || e.again):
			r.subscribe = append(r.subscribe, name)
			e.listed, e.again = true, false
		case !wanted && e.listed:
			r.unsubscribe = append(r.unsubscribe, name)
			e.listed, e.again, e.leaving = false, false, k.wildcarded
			k.settle(e)
		case !wanted:
			k.settle(e)
		}
	}
	clear(k.moved)
	return r
}
