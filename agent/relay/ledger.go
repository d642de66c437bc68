package relay

import (
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
)

// The types that readiness asks for, and that of clusters.
const (
	TypeListener  = "type.googleapis.com/envoy.config.listener.v3.Listener"
	TypeExtension = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
	TypeCluster   = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
)

// Ledger knows which resources the pod's Envoy holds: those that it ACKed and those that it says it has when it comes back.
type Ledger struct {
	logger *slog.Logger

	mu      sync.Mutex
	held    map[string]map[string]bool // type URL → name
	refused map[string]string          // type URL + " " + name → why, until it is ACKed
	current *session                   // nil: Envoy has gone
	changed chan struct{}
}

// session is one stream of Envoy's. What a session that is no longer current notes is left out: it is about an Envoy that has gone, or
// was overtaken by what the next stream says.
type session struct{ *Ledger }

func newLedger(logger *slog.Logger) *Ledger {
	return &Ledger{logger: logger, held: map[string]map[string]bool{}, refused: map[string]string{}, changed: make(chan struct{})}
}

// Forget is for when Envoy has gone: the next one holds nothing.
func (l *Ledger) Forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.held)
	clear(l.refused)
	l.current = nil
	l.announce()
}

// stream begins the session of a new stream. What Envoy holds stays: Envoy keeps it too.
func (l *Ledger) stream() *session {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.current = &session{Ledger: l}
	return l.current
}

func (l *Ledger) announce() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// Changed returns a channel that is closed at the next change. Take it before asking, so that no change is missed.
func (l *Ledger) Changed() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

// Missing returns those of the named resources of a type that Envoy does not hold, in the order given, each followed by Envoy's
// reason where it refused it.
func (l *Ledger) Missing(typeURL string, names ...string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var missing []string
	for _, n := range names {
		if l.held[typeURL][n] {
			continue
		}
		if why, ok := l.refused[typeURL+" "+n]; ok {
			n += " (refused by envoy: " + why + ")"
		}
		missing = append(missing, n)
	}
	return missing
}

// introduce notes what Envoy says that it holds, in the first request of a type.
func (s *session) introduce(typeURL string, held map[string]string) {
	s.note(func() {
		s.held[typeURL] = map[string]bool{}
		for n := range maps.Keys(held) {
			s.held[typeURL][n] = true
		}
	})
}

// accept notes an ACK.
func (s *session) accept(typeURL string, names, removed []string) {
	s.note(func() {
		for _, n := range names {
			s.held[typeURL][n] = true
			delete(s.refused, typeURL+" "+n)
		}
		for _, n := range removed {
			delete(s.held[typeURL], n)
			delete(s.refused, typeURL+" "+n)
		}
		slices.Sort(names)
		s.logger.Debug("relay: envoy accepted", "type", shortType(typeURL),
			"resources", strings.Join(names, ","), "removed", strings.Join(removed, ","))
	})
}

// refuse notes a NACK: Envoy keeps what it had of these resources.
func (s *session) refuse(typeURL string, names []string, reason string) {
	s.note(func() {
		for _, n := range names {
			s.refused[typeURL+" "+n] = reason
		}
		s.logger.Error("relay: envoy refused a configuration and keeps the one that it has",
			"type", shortType(typeURL), "resources", strings.Join(names, ","), "reason", reason)
	})
}

func (s *session) note(what func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != s {
		return
	}
	what()
	s.announce()
}

// shortType is the last part of a type URL: "Listener".
func shortType(url string) string { return url[strings.LastIndexByte(url, '.')+1:] }
