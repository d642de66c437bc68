package traffic

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestTry(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/hostname" {
			http.NotFound(w, r)
			return
		}
		_, _ = io.WriteString(w, "api-0\n")
	}))
	defer server.Close()
	closed := listen(t)
	closed.Close()
	mute := listen(t) // accepts, and closes without a word
	defer mute.Close()
	go func() {
		for {
			conn, err := mute.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	for _, c := range []struct {
		to   string
		want Outcome
		host string
	}{
		{server.Listener.Addr().String(), Reached, "api-0"},
		{closed.Addr().String(), Refused, ""},
		{mute.Addr().String(), Cut, ""},
		{"nobody.invalid:80", Unresolved, ""},
	} {
		if got := Try(t.Context(), c.to); got.Outcome != c.want || got.Host != c.host || got.Took <= 0 {
			t.Errorf("%s: got %+v, want %s %q", c.to, got, c.want, c.host)
		}
	}
}

func TestFlood(t *testing.T) {
	closed := listen(t)
	closed.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	in, out := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		ended <- Flood(ctx, out, []string{closed.Addr().String()})
		out.Close()
	}()
	lines := json.NewDecoder(bufio.NewReader(in))
	var last Tally
	for last.Tried < 5 {
		if err := lines.Decode(&last); err != nil {
			t.Fatal(err)
		}
	}
	if last.Outcomes[Refused] != last.Tried || len(last.Lately) != 1 {
		t.Errorf("a port where nobody listens: %+v", last)
	}
	cancel()
	go func() { _, _ = io.Copy(io.Discard, in) }()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}
