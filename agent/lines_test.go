package agent

import (
	"bytes"
	"sync"
	"testing"
	"time"
)

// lines is a writer whose lines can be awaited.
type lines struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{}
}

func newLines() *lines { return &lines{changed: make(chan struct{})} }

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
	return l.text.Write(b)
}

func (l *lines) read() (string, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String(), l.changed
}

const patience = 30 * time.Second

// await waits until ok says so of what was written.
func (l *lines) await(t *testing.T, what string, ok func(text string) bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		text, changed := l.read()
		if ok(text) {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("no %s within %s in:\n%s", what, patience, text)
		}
	}
}
