package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a program of a test's own, which the kernel kills when the test's process ends, however it ends.
type process struct {
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{}
	err  error // valid after done
}

// patience is how long a program is given to end by itself.
const patience = 10 * time.Second

// startChild starts a program that writes to the log file, at its end.
func startChild(log, path string, args ...string) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	p := &process{name: filepath.Base(path), cmd: exec.Command(path, args...), log: log, done: make(chan struct{})} //nolint:noctx // stop ends it
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		// The kernel's "parent" is the thread that started it: that thread must live as long.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	return p, nil
}

// kill ends the program as a crash does, and waits until it has ended.
func (p *process) kill() error {
	if p == nil {
		return nil
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	<-p.done
	return nil
}

// stop ends the program, by force after patience, and waits until it has ended.
func (p *process) stop() error {
	if p == nil {
		return nil
	}
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := p.cmd.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	forced := time.AfterFunc(patience, func() { _ = p.cmd.Process.Kill() })
	defer forced.Stop()
	<-p.done
	return nil
}

// await asks again and again until ready says nil, and fails early when the program ends. What ready said last is in the error.
func (p *process) await(ctx context.Context, ready func(context.Context) error) error {
	err := await(ctx, p.done, ready)
	if errors.Is(err, errEnded) {
		cause := p.err
		if cause == nil {
			cause = errors.New("exit status 0")
		}
		return fmt.Errorf("%s has ended: %w; the end of %s:\n%s", p.name, cause, p.log, tail(p.log))
	}
	if err != nil {
		return fmt.Errorf("%s is not ready: %w; the end of %s:\n%s", p.name, err, p.log, tail(p.log))
	}
	return nil
}

var errEnded = errors.New("ended")

// await asks every 50 ms until ready says nil; there is nothing to be told by where a program does not say when it is ready.
func await(ctx context.Context, ended <-chan struct{}, ready func(context.Context) error) error {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	var last error
	for {
		asked, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := ready(asked)
		cancel()
		if err == nil {
			return nil
		}
		if last == nil || ctx.Err() == nil { // an answer that was cut short tells less than the one before
			last = err
		}
		select {
		case <-again.C:
		case <-ended:
			return errEnded
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), last)
		}
	}
}

// tail is the last of a log, for an error message.
func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-8):], "\n")
}
