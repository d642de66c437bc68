package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// User says as whom a process runs. The zero User is uid 0 without any capability.
type User struct {
	// UID and GID of the process, without supplementary groups. Where only one uid is mapped (Enclosure.SingleUID) it is 0 whatever is asked.
	UID, GID uint32
	// Capable gives uid 0 all capabilities over the enclosure. Without it the process has none, can get none, and has no_new_privs set.
	Capable bool
}

// The users of a pod.
var (
	Root = User{Capable: true}        // what an agent needs to program its pod's network
	App  = User{UID: 1000, GID: 1000} // what a restricted container is
)

// Command is a program to run in a pod's network namespace.
type Command struct {
	Path string   // no search in PATH
	Args []string // without the program's name
	// Name is argv[0]. Empty: Path.
	Name string
	// Env is the whole environment. Nil: this process's own.
	Env []string
	// Dir is the working directory. Empty: this process's own.
	Dir string
	// Stdin, Stdout, Stderr are as in os/exec: nil is /dev/null.
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	// ExtraFiles become file descriptors 3, 4, …
	ExtraFiles []*os.File
	User       User
	// Terminal makes the process the leader of a session whose controlling terminal is Stdin, which must be a terminal.
	Terminal bool
	// Unshare are namespaces (unix.CLONE_NEW…) that the process gets of its own.
	Unshare uintptr
}

// Process is a running Command. It is the leader of a process group, which a terminal's Ctrl-C does not reach.
type Process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // valid after done
}

// closeOutput is how long output is still copied when a process has ended and something that it started holds its pipes open.
const closeOutput = time.Second

// start runs a command in a network namespace. When ctx ends, the process and its group are killed.
func start(ctx context.Context, ns *os.File, c Command, single bool) (*Process, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c.User.Capable && c.User.UID != 0 {
		return nil, fmt.Errorf("start %s in %s: only uid 0 can be capable, not %d", c.Path, ns.Name(), c.User.UID)
	}
	cmd := &exec.Cmd{
		Path: c.Path, Args: append([]string{c.Path}, c.Args...), Env: c.Env, Dir: c.Dir,
		Stdin: c.Stdin, Stdout: c.Stdout, Stderr: c.Stderr, ExtraFiles: c.ExtraFiles,
		WaitDelay:   closeOutput,
		SysProcAttr: &syscall.SysProcAttr{Setpgid: !c.Terminal, Setsid: c.Terminal, Setctty: c.Terminal, Unshareflags: c.Unshare},
	}
	if c.Name != "" {
		cmd.Args[0] = c.Name
	}
	if !single {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: c.User.UID, Gid: c.User.GID}
	}
	err := inNamespace(ns, func() error {
		if !c.User.Capable {
			if err := renounce(); err != nil {
				return err
			}
		}
		return cmd.Start()
	})
	if err != nil {
		return nil, fmt.Errorf("start %s in %s: %w", c.Path, ns.Name(), err)
	}
	p := &Process{name: c.Path, cmd: cmd, done: make(chan struct{})}
	release := context.AfterFunc(ctx, p.Kill)
	go func() {
		err := cmd.Wait()
		release()
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // what it left in its group
		if !errors.Is(err, exec.ErrWaitDelay) {
			p.err = err
		}
		close(p.done)
	}()
	return p, nil
}

// renounce makes every program that the calling thread starts from now on one without capabilities, uid 0 included: there is nothing in
// the bounding and inheritable sets that exec could give it. The thread itself keeps what it needs to change the program's uid.
func renounce() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	for c := uintptr(0); c <= lastCapability(); c++ {
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	if err := unix.Capset(&header, &data[0]); err != nil {
		return fmt.Errorf("clear inheritable capabilities: %w", err)
	}
	return nil
}

// PID is the process's number inside the enclosure.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended and its output is copied.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait returns how the process ended: nil for exit code 0, else an *exec.ExitError.
func (p *Process) Wait() error {
	<-p.done
	return p.err
}

// Signal sends a signal to the process alone.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// Kill ends the process and its group at once. Done tells when it is over.
func (p *Process) Kill() {
	select {
	case <-p.done:
	default:
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	}
}

// Stop asks the process to end with SIGTERM, and kills it when ctx ends. It returns what Wait does.
func (p *Process) Stop(ctx context.Context) error {
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-ctx.Done():
		p.Kill()
	}
	return p.Wait()
}
