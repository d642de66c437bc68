package envoy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"

	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Config says which Envoy to run and how.
type Config struct {
	Path         string // of the envoy binary
	Dir          string // where Envoy's files go; made and owned by Process
	Pod          string // "namespace/name"
	AgentSocket  string // path of the agent's unix socket
	Privilege    Privilege
	User         proxyuser.User // as whom Envoy runs
	Concurrency  int            // worker threads, at least 1
	DrainTimeout time.Duration  // how long open connections may live on after the end was asked for
	Output       io.Writer      // Envoy's log; an *os.File is handed to Envoy as it is
	Logger       *slog.Logger
	// Started is told the pid of each Envoy before that can have connected to the agent's socket, Exited that it is gone. Neither
	// may block.
	Started func(pid int)
	Exited  func()
}

const (
	restartFirst = 100 * time.Millisecond // pause before the first restart; doubled with each that follows
	restartMax   = 10 * time.Second
	restartCalm  = time.Minute            // an Envoy that lived this long died of something new
	stopGrace    = 2 * time.Second        // between SIGTERM and SIGKILL
	drainPoll    = 50 * time.Millisecond  // Envoy tells of no event when its last connection ends
	logFlush     = 300 * time.Millisecond // Envoy sends its access logs after up to 100 ms, and none when it ends
)

// Process is a pod's Envoy.
type Process struct {
	cfg   Config
	admin admin
}

// New checks the configuration and writes the bootstrap. Nothing is started yet.
func New(cfg Config) (*Process, error) {
	if cfg.Concurrency < 1 {
		return nil, fmt.Errorf("envoy concurrency %d: must be at least 1", cfg.Concurrency)
	}
	if err := cfg.Privilege.check(cfg.User); err != nil {
		return nil, err
	}
	path, err := exec.LookPath(cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("envoy binary: %w", err)
	}
	if cfg.Path, err = filepath.Abs(path); err != nil {
		return nil, fmt.Errorf("envoy binary: %w", err)
	}
	p := &Process{cfg: cfg, admin: newAdmin(filepath.Join(cfg.Dir, "admin.sock"))}
	if err := p.writeBootstrap(); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *Process) bootstrapPath() string { return filepath.Join(p.cfg.Dir, "bootstrap.json") }

// writeBootstrap makes Envoy's directory, which only Envoy's user may enter, and the bootstrap in it.
func (p *Process) writeBootstrap() error {
	b := Bootstrap{Pod: p.cfg.Pod, AgentSocket: p.cfg.AgentSocket, AdminSocket: filepath.Join(p.cfg.Dir, "admin.sock")}
	if p.cfg.Privilege == SharedUser {
		b.Mark = names.ProxyMark
	}
	text, err := b.JSON()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(p.cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("envoy directory: %w", err)
	}
	if err := os.Chmod(p.cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("envoy directory: %w", err)
	}
	if p.cfg.Privilege == OwnUser {
		if err := os.Chown(p.cfg.Dir, int(p.cfg.User.UID), int(p.cfg.User.GID)); err != nil {
			return fmt.Errorf("envoy directory: %w", err)
		}
	}
	if err := os.WriteFile(p.bootstrapPath(), text, 0o644); err != nil {
		return fmt.Errorf("envoy bootstrap: %w", err)
	}
	return nil
}

// Run keeps Envoy running until ctx ends, then drains and stops it. It always leaves with no Envoy running. It returns an error
// only where Envoy cannot be started at all (no such binary, no privilege); an Envoy that dies is started again.
func (p *Process) Run(ctx context.Context) error {
	pause := restartFirst
	for {
		began := time.Now()
		one, err := p.start()
		if err != nil {
			return err
		}
		select {
		case <-one.exited:
		case <-ctx.Done():
			p.stop(one)
			return nil
		}
		if time.Since(began) > restartCalm {
			pause = restartFirst
		}
		p.cfg.Logger.Error("envoy: died; connections are refused until it is back", "status", one.status(), "pid", one.pid,
			"lived", time.Since(began).Round(time.Millisecond), "restart_in", pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, restartMax)
	}
}

// running is one Envoy.
type running struct {
	pid    int
	cmd    *exec.Cmd
	exited chan struct{} // closed when it is gone
	err    error         // of Wait; read after exited
}

func (r *running) status() string {
	if r.err == nil {
		return "exit status 0"
	}
	return r.err.Error()
}

// start starts Envoy on a thread that does nothing else: what the thread gives up before, Envoy never has, and Envoy is killed when the
// thread ends, which it does with the agent and not before.
func (p *Process) start() (*running, error) {
	r := &running{exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		attr, err := p.cfg.Privilege.prepare(p.cfg.User)
		if err != nil {
			started <- fmt.Errorf("start envoy: %w", err)
			return
		}
		r.cmd = exec.Command(p.cfg.Path, p.arguments()...) //nolint:noctx // Run ends it: first it drains
		r.cmd.SysProcAttr = attr
		r.cmd.Env = []string{}
		r.cmd.Dir = p.cfg.Dir
		r.cmd.Stderr = p.cfg.Output
		r.cmd.WaitDelay = time.Second // no descendant of Envoy can keep Wait from returning
		if err := r.cmd.Start(); err != nil {
			started <- fmt.Errorf("start envoy: %w", err)
			return
		}
		r.pid = r.cmd.Process.Pid
		p.cfg.Started(r.pid)
		started <- nil
		r.err = r.cmd.Wait()
		p.cfg.Exited()
		close(r.exited)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	p.cfg.Logger.Info("envoy: started", "pid", r.pid)
	return r, nil
}

func (p *Process) arguments() []string {
	return []string{
		"--config-path", p.bootstrapPath(),
		"--concurrency", strconv.Itoa(p.cfg.Concurrency),
		"--disable-hot-restart",
		// A replaced listener is kept for this long even if nothing drains; the default of 600 s piles up memory.
		"--drain-time-s", "1",
		"--drain-strategy", "immediate",
		"--log-level", "warning",
		// Otherwise each message is walked by reflection for fields that this Envoy does not know, or that are deprecated or work in progress (each
		// CIDR of an IP matcher), to count and log them, and no more: a seventh of the CPU of an update. That Envoy knows all that is emitted
		// is tested (xds, TestEnvoyTakesWhatIsEmitted).
		"--ignore-unknown-dynamic-fields",
	}
}

// stop drains and ends Envoy.
func (p *Process) stop(r *running) {
	p.drain(r)
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		if err := r.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
			p.cfg.Logger.Error("envoy: cannot be signalled", "signal", s, "error", err)
		}
		select {
		case <-r.exited:
			p.cfg.Logger.Info("envoy: stopped", "status", r.status())
			return
		case <-time.After(stopGrace):
			p.cfg.Logger.Warn("envoy: still there", "signal", s, "after", stopGrace)
		}
	}
	<-r.exited // SIGKILL cannot be refused, only be slow
}

// drain stops accepting and waits until no connection is open, Envoy is gone or time is up.
func (p *Process) drain(r *running) {
	ctx, cancel := context.WithTimeout(context.Background(), p.cfg.DrainTimeout)
	defer cancel()
	if err := p.admin.stopAccepting(ctx); err != nil {
		p.cfg.Logger.Warn("envoy: cannot drain, stopping at once", "error", err)
		return
	}
	tick := time.NewTicker(drainPoll)
	defer tick.Stop()
	for {
		n, err := p.admin.openConnections(ctx)
		if err == nil && n == 0 {
			p.cfg.Logger.Info("envoy: drained")
			select {
			case <-time.After(logFlush):
			case <-r.exited:
			}
			return
		}
		select {
		case <-ctx.Done():
			p.cfg.Logger.Warn("envoy: drain timeout, cutting what is open", "connections", n, "after", p.cfg.DrainTimeout)
			return
		case <-r.exited:
			return
		case <-tick.C:
		}
	}
}
