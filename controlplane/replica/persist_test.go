package replica

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// refusing lets the first requests find nobody.
type refusing struct {
	http.RoundTripper
	left  int
	asked chan struct{} // gets one for each request
}

func (f *refusing) RoundTrip(r *http.Request) (*http.Response, error) {
	f.asked <- struct{}{}
	if f.left--; f.left >= 0 {
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")}
	}
	return f.RoundTripper.RoundTrip(r)
}

// TestPersistent: who watches waits until somebody answers, and no longer than it wants to; who writes is told at once.
func TestPersistent(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.Error(w, "later", http.StatusServiceUnavailable) }))
	defer server.Close()
	var log bytes.Buffer
	from := &refusing{RoundTripper: http.DefaultTransport, left: 2, asked: make(chan struct{}, 10)}
	p := persist(slog.New(slog.NewTextHandler(&log, nil)))(from)
	ask := func(ctx context.Context, method string) (status int, err error) {
		r, err := http.NewRequestWithContext(ctx, method, server.URL, http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := p.RoundTrip(r)
		if err != nil {
			return 0, err
		}
		answer.Body.Close()
		return answer.StatusCode, nil
	}
	answer, err := ask(t.Context(), http.MethodGet)
	if err != nil || answer != http.StatusServiceUnavailable {
		t.Fatalf("got %v, %v, want the server's own answer", answer, err)
	}
	if n := len(from.asked); n != 3 {
		t.Errorf("asked %d times, want 3", n)
	}
	if text := log.String(); strings.Count(text, "does not answer") != 1 || !strings.Contains(text, "server="+server.Listener.Addr().String()) || strings.Count(text, "answers again") != 1 {
		t.Errorf("logged:\n%s\nwant once that nobody answers, and who, and once that somebody does", text)
	}

	from.left = 1
	if _, err := ask(t.Context(), http.MethodPut); err == nil {
		t.Error("a write that nobody answered was asked again")
	}

	for len(from.asked) > 0 {
		<-from.asked
	}
	from.left = 1 << 30
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() {
		<-from.asked
		<-from.asked
		cancel()
	}()
	if _, err := ask(ctx, http.MethodGet); err == nil {
		t.Error("got an answer from nobody")
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Error("it did not end with its context")
	}
}
