package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// resumed is how long an agent that is not a pod's first holds up the kubelet before it lets it go on. The pod's other containers run already, and
// what the kubelet has to do for them waits meanwhile.
const resumed = 5 * time.Second

// beginning is what this agent knows of its pod's start: whether an agent before it had the pod enforced, and so its other containers started.
// What it knows is a file in the run directory, which lasts as long as the pod, with the pod's network namespace in it: a pod whose
// namespace is made anew, after its node has started anew, starts from the beginning.
type beginning struct {
	file      string
	namespace string
	before    bool
	refused   atomic.Pointer[string] // what the kubelet was told when it had waited in vain, and will end this agent for
}

func newBeginning(runDir string) (*beginning, error) {
	namespace, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("the pod's network namespace: %w", err)
	}
	s := &beginning{file: filepath.Join(runDir, "enforced"), namespace: namespace}
	text, err := os.ReadFile(s.file)
	s.before = err == nil && string(text) == namespace // where it cannot be read the pod starts from the beginning, which is the careful way
	return s, nil
}

// enforced takes down that the pod is enforced for the first time.
func (s *beginning) enforced(logger *slog.Logger) {
	s.refused.Store(nil)
	if s.before {
		return
	}
	if err := os.WriteFile(s.file, []byte(s.namespace), 0o600); err != nil {
		logger.Warn("agent: it cannot be taken down that the pod was enforced; an agent that starts anew will hold up its kubelet longer", "error", err)
		return
	}
}

// failed is why the kubelet ends this agent, if it does.
func (s *beginning) failed() error {
	if why := s.refused.Load(); why != nil {
		return fmt.Errorf("the pod was not enforced in time, and its other containers were not started: %s", *why)
	}
	return nil
}

// started says what is missing for the pod's other containers to start, or nothing once they may: as soon as the pod is enforced or, where they
// started before, after a moment. Either way the pod is closed until it is enforced.
func (r *readiness) started(ctx context.Context, wait time.Duration, logger *slog.Logger) []string {
	if r.beginning.before {
		wait = min(wait, resumed)
	}
	missing := r.within(ctx, wait)
	switch {
	case len(missing) == 0:
		return nil
	case r.beginning.before && r.closed() == nil:
		logger.Warn("agent: the pod is closed until it is enforced again; its containers go on", "missing", strings.Join(missing, "; "))
		return nil
	}
	why := strings.Join(missing, "; ")
	r.beginning.refused.Store(&why)
	logger.Warn("agent: the pod is not enforced, and its other containers are not started", "waited", wait, "missing", why)
	return missing
}

// within waits as long as it is told.
func (r *readiness) within(ctx context.Context, wait time.Duration) []string {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	return r.wait(ctx)
}

// closed says why the kernel does not keep the pod closed where nothing else does, or nil.
func (r *readiness) closed() error {
	for _, t := range r.tables {
		if err := t.Check(); err != nil {
			return err
		}
	}
	return nil
}
