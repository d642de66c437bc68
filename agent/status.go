package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// maxWait bounds ?wait=.
const maxWait = 10 * time.Minute

// statusHandler answers who asks about the pod: 200, or 503 with what is missing, a line each; with ?wait=DURATION the answer comes as soon as
// it is 200, or after that time.
//
//	GET /ready    200: the pod is enforced
//	GET /started  200: the pod's other containers may start; readiness.started says when
func statusHandler(r *readiness, logger *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	answer := func(pattern string, missing func(context.Context, time.Duration) []string) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, req *http.Request) {
			var wait time.Duration
			if text := req.URL.Query().Get("wait"); text != "" {
				var err error
				if wait, err = time.ParseDuration(text); err != nil || wait < 0 || wait > maxWait {
					http.Error(w, fmt.Sprintf("wait=%s: not a duration from 0s to %s", text, maxWait), http.StatusBadRequest)
					return
				}
			}
			if missing := missing(req.Context(), wait); len(missing) > 0 {
				http.Error(w, "not ready:\n"+strings.Join(missing, "\n"), http.StatusServiceUnavailable)
				return
			}
			fmt.Fprintln(w, "ready")
		})
	}
	answer("GET /ready", r.within)
	answer("GET /started", func(ctx context.Context, wait time.Duration) []string { return r.started(ctx, wait, logger) })
	return mux
}

// Ready asks the agent of a run directory whether its pod is enforced and waits for that, and for the agent, as long as it is told; 0: not at all.
// The error says what is missing.
func Ready(ctx context.Context, runDir string, wait time.Duration) error {
	return ask(ctx, runDir, "/ready", wait)
}

// Started is Ready's question as the kubelet asks it before it starts the pod's other containers. Where the pod was enforced before, and this is
// another agent of it, a few seconds are enough: the others run already.
func Started(ctx context.Context, runDir string, wait time.Duration) error {
	return ask(ctx, runDir, "/started", wait)
}

func ask(ctx context.Context, runDir, question string, wait time.Duration) error {
	until := time.Now().Add(wait)
	conn, err := dialWithin(ctx, StatusSocket(runDir), until)
	if err != nil {
		return fmt.Errorf("no agent answers in %s: %w", runDir, err)
	}
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	left := max(0, time.Until(until))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent"+question+"?wait="+url.QueryEscape(left.String()), nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("no agent answers in %s: %w", runDir, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(strings.TrimSpace(string(body)))
	}
	return nil
}

const redial = 10 * time.Millisecond

// dialWithin connects to a socket that may not be there yet: the kubelet asks as soon as it has started the agent.
func dialWithin(ctx context.Context, socket string, until time.Time) (net.Conn, error) {
	for {
		c, err := new(net.Dialer).DialContext(ctx, "unix", socket)
		absent := errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) // or left there by an agent before
		if !absent || !time.Now().Before(until) {
			return c, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(redial):
		}
	}
}
