package agent

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// resumed is how long an agent that is not a pod's first holds up the kubelet before it lets it go on. The pod's other containers run already, and
// what the kubelet has to do for them waits meanwhile.
const resumed = 5 * time.Second

// alone is how long an agent holds up the kubelet that the control plane does not answer: nothing says that it will. A pod that is deleted meanwhile
// waits as long. Less would end agents on nodes that are slow, as when 50 pods start there at once, and ended and started anew they are slower. Whoever
// has been answered is given more time.
const alone = time.Minute

// beginning is what this agent knows of its pod's start: whether an agent before it had the pod enforced, and so its other containers started. What
// it knows is a file in the run directory, which lasts as long as the pod, with the pod's network namespace in it: a pod whose namespace
// was made anew starts from the beginning.
type beginning struct {
	file      string
	namespace string // "": not known
	before    bool
	refused   atomic.Pointer[string] // what the kubelet was told when it had waited in vain, and will end this agent for
}

// newBeginning reads the file. What cannot be read means that the pod starts from the beginning, which is the careful way; so it does with capture by
// the node, where it is not this agent that closes the pod.
func newBeginning(cfg Config) *beginning {
	b := &beginning{file: filepath.Join(cfg.RunDir, "enforced")}
	cookie, err := namespaceCookie()
	if err != nil || cfg.Capture == CaptureNode {
		return b
	}
	b.namespace = strconv.FormatUint(cookie, 10)
	text, err := os.ReadFile(b.file)
	b.before = err == nil && string(text) == b.namespace
	return b
}

// namespaceCookie is a number that no other network namespace has had since the machine was started (SO_NETNS_COOKIE, since Linux 5.14).
func namespaceCookie() (uint64, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	return unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}

// enforced takes down that the pod is enforced for the first time.
func (b *beginning) enforced(logger *slog.Logger) {
	b.refused.Store(nil)
	if b.before || b.namespace == "" {
		return
	}
	if err := os.WriteFile(b.file, []byte(b.namespace), 0o600); err != nil {
		logger.Warn("agent: it cannot be taken down that the pod was enforced; an agent that starts anew will hold up the kubelet longer", "error", err)
	}
}

// failed is why the kubelet ends this agent, if it does.
func (b *beginning) failed() error {
	if why := b.refused.Load(); why != nil {
		return fmt.Errorf("the pod was not enforced in time, and its other containers were not started: %s", *why)
	}
	return nil
}

// started says what is missing for the pod's other containers to start, or nothing once they may: as soon as the pod is enforced or, where they
// started before, after a moment. The agent has closed the pod before it is asked.
func (r *readiness) started(ctx context.Context, wait time.Duration, logger *slog.Logger) []string {
	first := min(wait, alone)
	if r.beginning.before {
		first = min(wait, resumed)
	}
	waited, missing := first, r.within(ctx, first)
	if len(missing) > 0 && !r.beginning.before && r.answered() {
		waited, missing = wait, r.within(ctx, wait-first)
	}
	switch {
	case len(missing) == 0:
		return nil
	case r.beginning.before:
		logger.Warn("agent: the pod is closed until it is enforced again; its containers go on", "missing", strings.Join(missing, "; "))
		return nil
	}
	why := strings.Join(missing, "; ")
	r.beginning.refused.Store(&why)
	logger.Warn("agent: the pod is not enforced, and its other containers are not started", "waited", waited, "missing", why)
	return missing
}

// answered reports whether the control plane has signed a certificate, and nothing speaks against its giving configuration.
func (r *readiness) answered() bool {
	_, err := r.source.GetX509SVID()
	return err == nil && r.trouble() == ""
}

// within waits as long as it is told.
func (r *readiness) within(ctx context.Context, wait time.Duration) []string {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	return r.wait(ctx)
}
