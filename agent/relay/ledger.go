package relay

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
)

// The types that readiness asks for.
const (
	TypeListener  = "type.googleapis.com/envoy.config.listener.v3.Listener"
	TypeExtension = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig"
)

// maxUnanswered bounds the responses that Envoy has neither ACKed nor NACKed. Envoy answers each before it reads the next.
const maxUnanswered = 1024

// Ledger knows which resources the pod's Envoy holds: those that it ACKed and those that it says it has when it comes back.
type Ledger struct {
	logger *slog.Logger

	mu      sync.Mutex
	held    map[string]map[string]bool // type URL → name
	refused map[string]string          // type URL + " " + name → why, until it is ACKed
	current *session                   // nil: Envoy has gone
	changed chan struct{}
}

// session is the bookkeeping of one stream. What a session that is no longer current notes is left out: it is about an Envoy that has gone,
// or was overtaken by what the next stream says.
type session struct {
	*Ledger
	unanswered map[string]response // nonce →
	introduced map[string]bool     // type URLs that Envoy has named
}

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
	l.current = &session{Ledger: l, unanswered: map[string]response{}, introduced: map[string]bool{}}
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

// response notes what goes to Envoy.
func (l *session) response(r response) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current != l {
		return nil
	}
	if len(l.unanswered) >= maxUnanswered {
		return errors.New("envoy has left 1024 responses unanswered")
	}
	if _, twice := l.unanswered[r.nonce]; twice || r.nonce == "" {
		return fmt.Errorf("the control plane sent a response with the nonce %q, empty or in use", r.nonce)
	}
	l.unanswered[r.nonce] = r
	return nil
}

// request notes what comes from Envoy.
func (l *session) request(r request) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.current != l {
		return
	}
	if !l.introduced[r.typeURL] { // only the first request of a type says what Envoy holds
		l.introduced[r.typeURL] = true
		l.held[r.typeURL] = map[string]bool{}
		for _, n := range r.held {
			l.held[r.typeURL][n] = true
		}
		l.announce()
	}
	if r.nonce == "" {
		return
	}
	answered, ok := l.unanswered[r.nonce]
	if !ok {
		l.logger.Warn("relay: envoy answers a response that it was not sent", "type", r.typeURL, "nonce", r.nonce)
		return
	}
	delete(l.unanswered, r.nonce)
	if r.nack {
		// Envoy keeps what it had of these resources.
		for _, n := range answered.names {
			l.refused[r.typeURL+" "+n] = r.reason
		}
		l.logger.Error("relay: envoy refused a configuration and keeps the one that it has",
			"type", shortType(r.typeURL), "resources", strings.Join(answered.names, ","), "reason", r.reason)
		l.announce()
		return
	}
	for _, n := range answered.names {
		l.held[r.typeURL][n] = true
		delete(l.refused, r.typeURL+" "+n)
	}
	for _, n := range answered.removed {
		delete(l.held[r.typeURL], n)
		delete(l.refused, r.typeURL+" "+n)
	}
	slices.Sort(answered.names)
	l.logger.Debug("relay: envoy accepted", "type", shortType(r.typeURL),
		"resources", strings.Join(answered.names, ","), "removed", strings.Join(answered.removed, ","))
	l.announce()
}

// shortType is the last part of a type URL: "Listener".
func shortType(url string) string { return url[strings.LastIndexByte(url, '.')+1:] }
