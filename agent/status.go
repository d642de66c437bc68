package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// maxWait bounds ?wait=.
const maxWait = 10 * time.Minute

// statusHandler answers probes: GET /ready is 200 or 503 with what is missing, a line each; with ?wait=DURATION the answer comes as soon as
// it is 200, or after that time.
func statusHandler(r *readiness) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, req *http.Request) {
		var wait time.Duration
		if text := req.URL.Query().Get("wait"); text != "" {
			var err error
			if wait, err = time.ParseDuration(text); err != nil || wait < 0 || wait > maxWait {
				http.Error(w, fmt.Sprintf("wait=%s: not a duration from 0s to %s", text, maxWait), http.StatusBadRequest)
				return
			}
		}
		ctx, cancel := context.WithTimeout(req.Context(), wait)
		defer cancel()
		if missing := r.wait(ctx); len(missing) > 0 {
			http.Error(w, "not ready:\n"+strings.Join(missing, "\n"), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	return mux
}

// Ready asks the agent of a run directory whether its pod is enforced and waits for that as long as it is told; 0: not at all. The
// error says what is missing.
func Ready(ctx context.Context, runDir string, wait time.Duration) error {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", StatusSocket(runDir))
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/ready?wait="+url.QueryEscape(wait.String()), nil)
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
