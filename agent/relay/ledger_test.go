package relay

import (
	"bytes"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestLedger(t *testing.T) {
	var log bytes.Buffer
	l := newLedger(slog.New(slog.NewTextHandler(&log, nil)))
	missing := func(want ...string) {
		t.Helper()
		if got := l.Missing(TypeListener, "a", "b"); !slices.Equal(got, want) {
			t.Errorf("missing %q, want %q", got, want)
		}
	}
	s := l.stream()
	send := func(nonce string, names, removed []string) {
		t.Helper()
		if err := s.response(response{typeURL: TypeListener, nonce: nonce, names: names, removed: removed}); err != nil {
			t.Fatal(err)
		}
	}
	answer := func(nonce, refusal string) {
		t.Helper()
		changed := l.Changed()
		s.request(request{typeURL: TypeListener, nonce: nonce, nack: refusal != "", reason: refusal})
		select {
		case <-changed:
		default:
			t.Errorf("the answer to %s is not announced", nonce)
		}
	}
	missing("a", "b")
	s.request(request{typeURL: TypeListener, subscribe: []string{"*"}})
	send("1", []string{"a"}, nil)
	missing("a", "b") // sent is not held
	answer("1", "")
	missing("b")
	send("2", []string{"b"}, nil)
	answer("2", "bad port")
	missing("b (refused by envoy: bad port)")
	if !strings.Contains(log.String(), "resources=b") || !strings.Contains(log.String(), `reason="bad port"`) {
		t.Errorf("log of the NACK: %s", &log)
	}
	send("3", []string{"a"}, nil)
	answer("3", "worse") // Envoy keeps the a that it had
	missing("b (refused by envoy: bad port)")
	send("4", []string{"b"}, []string{"a"})
	answer("4", "")
	missing("a")

	// Another stream of the same Envoy: it says what it holds.
	s = l.stream()
	missing("a")
	s.request(request{typeURL: TypeListener, held: []string{"a"}})
	missing("b")
	s.request(request{typeURL: TypeListener, subscribe: []string{"more"}}) // only the first request says it
	missing("b")
	// Another Envoy: it holds nothing.
	s = l.stream()
	s.request(request{typeURL: TypeListener})
	missing("a", "b")

	send("5", []string{"a", "b"}, nil)
	answer("5", "")
	missing()
	l.Forget()
	missing("a", "b")
	s.request(request{typeURL: TypeListener, held: []string{"a"}}) // a last word of the Envoy that has gone
	missing("a", "b")
	if got := l.Missing(TypeExtension, "a"); len(got) != 1 {
		t.Error("another type's resource counts")
	}
}

// Nonces belong to a stream; what was sent on the one before is not answered on this one.
func TestLedgerForgetsFlightsWithTheStream(t *testing.T) {
	l := newLedger(slog.New(slog.DiscardHandler))
	s := l.stream()
	if err := s.response(response{typeURL: TypeListener, nonce: "1", names: []string{"a"}}); err != nil {
		t.Fatal(err)
	}
	s = l.stream()
	s.request(request{typeURL: TypeListener, nonce: "1"})
	if len(l.Missing(TypeListener, "a")) == 0 {
		t.Error("an ACK on another stream counts")
	}
}

func TestLedgerIsBounded(t *testing.T) {
	l := newLedger(slog.New(slog.DiscardHandler))
	s := l.stream()
	for i := range maxUnanswered {
		if err := s.response(response{nonce: strconv.Itoa(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.response(response{nonce: "one more"}); err == nil {
		t.Error("no bound")
	}
	s = l.stream()
	if err := s.response(response{}); err == nil {
		t.Error("a response without a nonce")
	}
	for i := range 2 {
		if err := s.response(response{nonce: "twice"}); (err != nil) != (i == 1) {
			t.Errorf("nonce sent %d times: %v", i+1, err)
		}
	}
}
