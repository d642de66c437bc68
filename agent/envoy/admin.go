package envoy

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
)

// admin asks Envoy's admin interface on its unix socket. Each question is a connection of its own.
type admin struct{ client *http.Client }

func newAdmin(socket string) admin {
	return admin{&http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}}
}

func (a admin) do(ctx context.Context, method, path string, read func(io.Reader) error) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://envoy"+path, nil)
	if err != nil {
		return err
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return fmt.Errorf("envoy admin: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		return fmt.Errorf("envoy admin: %s %s: %s: %s", method, path, resp.Status, strings.TrimSpace(string(body)))
	}
	if err := read(resp.Body); err != nil {
		return fmt.Errorf("envoy admin: %s %s: %w", method, path, err)
	}
	return nil
}

func discard(r io.Reader) error {
	_, err := io.Copy(io.Discard, r)
	return err
}

// stopAccepting closes the listening sockets. Open connections live on.
func (a admin) stopAccepting(ctx context.Context) error {
	return a.do(ctx, http.MethodPost, "/drain_listeners", discard)
}

// openConnections counts the connections that listeners have accepted and not closed, the admin interface's own left out.
func (a admin) openConnections(ctx context.Context) (int, error) {
	n := 0
	err := a.do(ctx, http.MethodGet, `/stats?filter=^listener\..*\.downstream_cx_active$`, func(r io.Reader) error {
		lines := bufio.NewScanner(r)
		for lines.Scan() {
			name, value, ok := strings.Cut(lines.Text(), ": ")
			if !ok || strings.HasPrefix(name, "listener.admin.") {
				continue
			}
			v, err := strconv.Atoi(value)
			if err != nil {
				return fmt.Errorf("stat %s: %w", name, err)
			}
			if !strings.Contains(name, ".worker_") { // the same connections once more, by worker
				n += v
			}
		}
		return lines.Err()
	})
	return n, err
}
