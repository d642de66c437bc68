package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// How long the kubelet waits for a pod that does not come to be enforced, and what it is told then.
func TestStartedInVain(t *testing.T) {
	for _, tt := range []struct {
		name    string
		before  bool
		svid    error
		trouble string
		wait    time.Duration
		takes   time.Duration
		starts  bool
	}{
		{"the control plane has not answered", false, errors.New("no SVID"), "", 2 * time.Minute, time.Minute, false},
		{"it does not answer any more", false, nil, "control plane: gone", 2 * time.Minute, time.Minute, false},
		{"it has answered", false, nil, "", 2 * time.Minute, 2 * time.Minute, false},
		{"as long as is asked for", false, errors.New("no SVID"), "", time.Second, time.Second, false},
		{"the pod was enforced before", true, errors.New("no SVID"), "", 2 * time.Minute, 5 * time.Second, true},
		{"it was, and little is asked for", true, errors.New("no SVID"), "", time.Second, time.Second, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := &parts{svid: tt.svid, missing: map[string][]string{relay.TypeListener: {"gate"}}, changed: make(chan struct{})}
				r := &readiness{
					tables: []table{p}, source: p, ledger: p, verdicts: noVerdicts{p}, packets: noPackets{p}, envoy: newPeer(proxyuser.User{UID: uint32(os.Getuid())}),
					identity: func() (string, <-chan struct{}) { return "", p.changed },
					trouble:  func() string { return tt.trouble }, beginning: &beginning{before: tt.before},
				}
				r.envoy.set(1)
				began := time.Now()
				missing := r.started(t.Context(), tt.wait, slog.New(slog.DiscardHandler))
				if took := time.Since(began); took != tt.takes {
					t.Errorf("after %s, want %s", took, tt.takes)
				}
				if starts := len(missing) == 0; starts != tt.starts {
					t.Errorf("missing %q, want the others to start: %t", missing, tt.starts)
				}
				if failed := r.beginning.failed(); (failed == nil) != tt.starts || failed != nil && !strings.Contains(failed.Error(), "gate") {
					t.Errorf("the agent ends with: %v", failed)
				}
			})
		})
	}
}

// The kubelet may ask before the agent is there. A pod's first agent lets the others start when the pod is enforced and not before; one that comes
// after it lets them go on, with the pod closed. In another network namespace it is the first again.
func TestStarted(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	agents := 0
	begin := func() {
		w.startAgent()
		agents++
		w.log.await(t, "an agent that can be asked", func(s string) bool { return strings.Count(s, "envoy: started") == agents })
	}
	end := func() error {
		w.cancel()
		w.finished = true
		return <-w.ended
	}
	const little = 100 * time.Millisecond
	if err := Started(t.Context(), w.cfg.RunDir, 0); err == nil || !strings.Contains(err.Error(), "no agent answers") {
		t.Errorf("without an agent: %v", err)
	}
	begin()
	if err := Started(t.Context(), w.cfg.RunDir, little); err == nil || !strings.Contains(err.Error(), "no verdicts from the control plane") {
		t.Errorf("without a control plane: %v", err)
	}
	w.refused("before it is enforced")
	if err := end(); err == nil || !strings.Contains(err.Error(), "no verdicts from the control plane") {
		t.Errorf("the agent that the kubelet has waited for in vain ends with: %v", err)
	}

	w.startPlane()
	early := make(chan error)
	go func() { early <- Started(t.Context(), w.cfg.RunDir, patience) }()
	begin()
	if err := <-early; err != nil {
		t.Fatal(err)
	}
	w.log.await(t, "readiness", func(s string) bool { return strings.Contains(s, "agent: ready") })
	if err := end(); err != nil {
		t.Error(err)
	}
	w.stopPlane()

	begin()
	if err := Started(t.Context(), w.cfg.RunDir, little); err != nil {
		t.Errorf("an agent that is not the first: %v", err)
	}
	w.refused("while there is no control plane")
	if err := end(); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(w.cfg.RunDir, "enforced"), []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	begin()
	if err := Started(t.Context(), w.cfg.RunDir, little); err == nil {
		t.Error("in another namespace the pod's others start before it is enforced")
	}
	if err := end(); err == nil {
		t.Error("and its agent ends as if it had been")
	}
}

// An agent that has ended leaves its socket; who asks gives up when the time is over, or the context is.
func TestAskNobody(t *testing.T) {
	directory := t.TempDir()
	if err := os.WriteFile(StatusSocket(directory), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Ready(t.Context(), directory, 50*time.Millisecond); err == nil {
		t.Error("somebody has answered")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Started(ctx, directory, time.Hour); err == nil {
		t.Error("somebody has answered")
	}
}
