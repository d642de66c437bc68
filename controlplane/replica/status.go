package replica

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/mantlet/mantlet/controlplane/status"
)

// listenStatus opens the status port. It tells all policy, and who is not enforced, to whoever asks: so only the replica's own loopback is
// good enough, to which the API server forwards for those who may create pods/portforward in its namespace.
func listenStatus(ctx context.Context, address string) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("status port: %w", err)
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("status port %s: not an address of loopback; it tells whoever asks where policy is not in force", address)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("status port: %w", err)
	}
	return l, nil
}

// retired is the part of a report that the records have.
func (r *replica) retired() (out status.Retired) {
	retirements, bindings := r.records.Known()
	out.Identities = len(retirements)
	for _, b := range bindings {
		out.Bindings = append(out.Bindings, status.Binding{Namespace: b.Namespace, Until: b.Until, Why: b.Why})
	}
	if err := r.records.Problem(); err != nil {
		out.Problem = err.Error()
	}
	return out
}

// serveStatus serves the replica's report until ctx ends.
func (r *replica) serveStatus(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+status.Path, func(w http.ResponseWriter, _ *http.Request) {
		cp := r.plane.Load()
		if cp == nil || !r.serving.Load() {
			http.Error(w, "not ready: the cluster is not known yet, or the process ends", http.StatusServiceUnavailable)
			return
		}
		report := cp.Report()
		report.Replica, report.Retired = r.cfg.Name, r.retired()
		if unbundled, err := r.bundle.Load().Behind(); err == nil { // it is there before the plane is
			report.Unbundled = unbundled
		} else {
			report.Unbundled = []string{err.Error()}
		}
		for i := range report.Namespaces {
			report.Namespaces[i].Exempt = slices.Contains(r.cfg.Exempt, report.Namespaces[i].Name)
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(report); err != nil {
			r.cfg.Log.Debug("a status report was not taken", "error", err)
		}
	})
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, BaseContext: func(net.Listener) context.Context { return ctx }}
	stopped := context.AfterFunc(ctx, func() { _ = s.Close() })
	defer stopped()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("status port: %w", err)
	}
	return nil
}
