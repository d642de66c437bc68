package server

import (
	"strings"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const wildcard = "*"

// outcome is what the caller of request has to do once the lock is released.
type outcome struct {
	events       []Event
	counted      Counters
	subscribed   []string // on demand
	unsubscribed []string
	refused      []string // names past a limit
	nacked       *nacked
}

// request takes one DeltaDiscoveryRequest. A response_nonce that is not ours, or not any more, is no reason to ignore the
// subscription changes beside it.
func (s *Server) request(st *stream, req *discoveryv3.DeltaDiscoveryRequest) (out outcome, err error) {
	c, now := st.client, s.cfg.Now()
	switch {
	case req.TypeUrl == "":
		return out, status.Error(codes.InvalidArgument, "request without type_url")
	case len(req.ResourceLocatorsSubscribe)+len(req.ResourceLocatorsUnsubscribe) > 0:
		return out, status.Errorf(codes.InvalidArgument, "request for %s: resource locators are not served, subscribe by name", req.TypeUrl)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stream != st {
		return out, nil // replaced; its end is on the way
	}
	ts := c.typeState(req.TypeUrl)
	first := !ts.asked
	if first {
		if st.types++; st.types > maxTypes {
			return out, status.Errorf(codes.ResourceExhausted, "request for %s: more than %d resource types on one stream", req.TypeUrl, maxTypes)
		}
	}
	defer func() { ts.counters.add(out.counted) }()
	if f := st.flights[req.ResponseNonce]; f != nil && f.url == req.TypeUrl {
		delete(st.flights, req.ResponseNonce)
		if req.ErrorDetail == nil {
			out.counted.Acks = 1
			out.events = c.acked(ts, f, now)
		} else {
			out.counted.Nacks = 1
			out.nacked, out.events = s.rejected(c, ts, f, req.ErrorDetail.GetMessage(), now)
		}
	}
	if first {
		c.adopt(ts, req.InitialResourceVersions, now)
	}
	for _, name := range req.ResourceNamesUnsubscribe {
		if name == wildcard {
			ts.unsubscribeAll()
		} else if s.unsubscribe(c, ts, name) {
			out.unsubscribed = append(out.unsubscribed, name)
		}
	}
	for _, name := range req.ResourceNamesSubscribe {
		_, held := req.InitialResourceVersions[name]
		switch {
		case name == wildcard:
			ts.subscribeAll()
		case s.excessive(c, ts, name):
			if ts.refused == nil {
				ts.refused = map[string]struct{}{}
			}
			ts.refused[name] = struct{}{}
			out.refused = append(out.refused, name)
		case s.subscribe(c, ts, name, first && held, now):
			out.subscribed = append(out.subscribed, name)
		}
	}
	if len(ts.refused) > s.cfg.MaxSubscriptions {
		return out, status.Errorf(codes.ResourceExhausted, "request for %s: more than %d names past the limit wait for their refusal", req.TypeUrl, s.cfg.MaxSubscriptions)
	}
	if first && len(req.ResourceNamesSubscribe) == 0 && (req.TypeUrl == ListenerType || req.TypeUrl == ClusterType) {
		ts.subscribeAll() // the protocol's older way of saying "*"
	}
	c.wake()
	c.moved()
	return out, nil
}

// adopt takes what a reconnecting client says that it holds. A client that holds nothing of a type is a fresh Envoy, which
// has never seen what another refused: the refusals of that type are forgotten, so that a cause that went away (an address in
// use, an extension that a new version has) does not keep a listener away for ever.
func (c *client) adopt(ts *typeState, versions map[string]string, now time.Time) {
	ts.asked = true
	if len(versions) == 0 {
		ts.refusals = nil
	}
	for _, e := range ts.entries {
		e.acked, e.held = "", ""
		ts.mark(e)
	}
	for name, version := range versions {
		e := ts.entry(name)
		if e.seq == 0 {
			c.seq++
			e.seq = c.seq
		}
		e.acked, e.held, e.ackedAt = version, version, now
		ts.mark(e)
	}
}

func (ts *typeState) subscribeAll() {
	ts.wildcard, ts.answerDue = true, true
	for _, e := range ts.entries {
		if e.static != nil {
			ts.mark(e)
		}
	}
}

// unsubscribeAll ends the wildcard. The client drops what it did not also ask for by name, without being told.
func (ts *typeState) unsubscribeAll() {
	ts.wildcard, ts.answerDue = false, false
	for _, e := range ts.entries {
		if !e.explicit {
			e.due = false
			ts.mark(e)
		}
	}
}

func (s *Server) excessive(c *client, ts *typeState, name string) bool {
	if name == "" || len(name) > s.cfg.MaxNameLength {
		return true
	}
	e := ts.entries[name]
	return (e == nil || !e.explicit) && c.explicit >= s.cfg.MaxSubscriptions
}

// subscribe adds a name and reports whether it is newly subscribed to on demand. Even a name that the client has already is
// answered: it may have dropped it meanwhile. The exception is what it listed as held in this very request.
func (s *Server) subscribe(c *client, ts *typeState, name string, held bool, now time.Time) bool {
	e := ts.entry(name)
	again := e.explicit
	e.due = !held
	ts.mark(e)
	if !again {
		e.explicit, e.wantedAt = true, now
		c.explicit++
	}
	if ts.url != ClusterType {
		return false
	}
	if !again {
		s.index.add(name, c.name)
	}
	if e.static != nil {
		return false
	}
	c.seq++
	e.seq, e.stale = c.seq, true
	return !again
}

// unsubscribe removes a name and reports whether it was subscribed to on demand. Below a wildcard the client cannot know
// whether the name is part of that, so it is answered either way; otherwise the client drops it without being told.
func (s *Server) unsubscribe(c *client, ts *typeState, name string) bool {
	e := ts.entries[name]
	if e == nil || !e.explicit {
		return false
	}
	onDemand := e.static == nil && ts.url == ClusterType
	if ts.url == ClusterType {
		s.index.remove(name, c.name)
	}
	c.explicit--
	e.explicit, e.stale, e.due = false, false, ts.wildcard
	ts.mark(e)
	return onDemand
}

// resolve asks for the on-demand names that are stale. The lock is not held while asking; a name that goes stale again
// meanwhile stays stale.
func (s *Server) resolve(st *stream) {
	c := st.client
	for _, q := range c.questions(st) {
		r, ok := s.cfg.OnDemand.Resolve(c.name, q.name)
		if !ok {
			r = nil
		}
		if r != nil && (r.wire == nil || r.Type != ClusterType || r.Name != q.name) {
			s.cfg.Log.Error("on-demand answer is not the cluster that was asked for; answered as unknown", "client", c.name, "name", q.name, "type", r.Type, "got", r.Name)
			r = nil
		}
		c.resolved(st, q, r, s.cfg.Now())
	}
}

type question struct {
	name string
	seq  uint64
}

func (c *client) questions(st *stream) (list []question) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ts := c.types[ClusterType]
	if ts == nil || c.stream != st || !c.published {
		return nil
	}
	for name, e := range ts.pending {
		if e.stale {
			list = append(list, question{name, e.seq})
		}
	}
	return list
}

func (c *client) resolved(st *stream, q question, r *Resource, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.types[ClusterType].entries[q.name]
	if c.stream != st || e == nil || e.seq != q.seq || !e.stale {
		return
	}
	version := e.wantedVersion()
	e.demanded, e.stale = r, false
	if e.wantedVersion() != version {
		e.wantedAt = now
	}
}

// shorten cuts what comes from outside to a length that a log line bears.
func shorten(s string) string {
	const most = 2048
	if len(s) > most {
		s = s[:most] + "…"
	}
	return strings.ToValidUTF8(s, "?")
}
