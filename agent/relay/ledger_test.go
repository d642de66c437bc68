package relay

import (
	"bytes"
	"log/slog"
	"slices"
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
	announced := func(what func()) {
		t.Helper()
		changed := l.Changed()
		what()
		select {
		case <-changed:
		default:
			t.Error("a change is not announced")
		}
	}
	s := l.stream()
	missing("a", "b")
	announced(func() { s.introduce(TypeListener, nil) })
	announced(func() { s.accept(TypeListener, []string{"a"}, nil) })
	missing("b")
	announced(func() { s.refuse(TypeListener, []string{"b"}, "bad port") })
	missing("b (refused by envoy: bad port)")
	if !strings.Contains(log.String(), "resources=b") || !strings.Contains(log.String(), `reason="bad port"`) {
		t.Errorf("log of the NACK: %s", &log)
	}
	announced(func() { s.refuse(TypeListener, []string{"a"}, "worse") }) // Envoy keeps the a that it had
	missing("b (refused by envoy: bad port)")
	announced(func() { s.accept(TypeListener, []string{"b"}, []string{"a"}) })
	missing("a")

	// Another stream of the same Envoy: it says what it holds.
	before := s
	s = l.stream()
	missing("a")
	before.accept(TypeListener, []string{"a"}, nil) // a last word on the stream before
	missing("a")
	announced(func() { s.introduce(TypeListener, map[string]string{"a": "1"}) })
	missing("b")
	// Another Envoy: it holds nothing.
	s = l.stream()
	s.introduce(TypeListener, nil)
	missing("a", "b")

	s.accept(TypeListener, []string{"a", "b"}, nil)
	missing()
	announced(l.Forget)
	missing("a", "b")
	s.introduce(TypeListener, map[string]string{"a": "1"}) // a last word of the Envoy that has gone
	missing("a", "b")
	if got := l.Missing(TypeExtension, "a"); len(got) != 1 {
		t.Error("another type's resource counts")
	}
}
