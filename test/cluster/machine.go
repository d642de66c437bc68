package cluster

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Machine is a set of namespaces that stands for a computer: mount, network, PID, IPC, UTS. It lives as long as its first process, and so
// does everything in it.
type Machine struct {
	Name string `json:"name"`
	Init Task   `json:"init"`
	// Tasks are the programs that the cluster itself is made of, by name.
	Tasks map[string]Task `json:"tasks"`
}

// Task is a process, which may have ended. Its start tells it from a later one with the same ID.
type Task struct {
	PID   int      `json:"pid"`
	Start uint64   `json:"start"` // clock ticks after boot
	Log   string   `json:"log,omitempty"`
	Args  []string `json:"args,omitempty"` // with the program's path
}

// startMachine starts the first process and waits until the machine is ready.
func startMachine(init, name, directory string, life Lifetime) (*Machine, error) {
	if err := os.MkdirAll(directory, 0o755); err != nil {
		return nil, err
	}
	heard, report, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer heard.Close()
	cmd := exec.Command(init, name, directory) //nolint:noctx // it is to outlive the call
	cmd.ExtraFiles = []*os.File{report}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
	}
	if life == WithProcess {
		cmd.SysProcAttr.Pdeathsig = unix.SIGKILL
	}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // whose end would be the parent's end
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // whoever ends it knows
		}
	}()
	err = <-started
	report.Close()
	if err != nil {
		return nil, fmt.Errorf("machine %s: %w", name, err)
	}
	m := &Machine{Name: name, Tasks: map[string]Task{}}
	if m.Init, err = taskOf(cmd.Process.Pid); err != nil {
		return nil, fmt.Errorf("machine %s: %w", name, err)
	}
	said, err := io.ReadAll(heard)
	if len(said) > 0 {
		err = errors.New(strings.TrimSpace(string(said)))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("machine %s: %w", name, err), m.Init.kill())
	}
	return m, nil
}

// Root is the machine's file system as seen from here.
func (m *Machine) Root() string { return fmt.Sprintf("/proc/%d/root", m.Init.PID) }

// Command runs a program of the machine's file system in the machine, as root.
func (m *Machine) Command(args ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(m.Init.PID), "--mount", "--net", "--pid", "--ipc", "--uts", "--"}
	return exec.Command("nsenter", append(enter, args...)...) //nolint:noctx // the caller's to say
}

// start runs a program in the machine, which goes on when this process has ended.
func (m *Machine) start(name, log string, args ...string) error {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(args[0], args[1:]...) //nolint:noctx // it is to outlive the call
	cmd.Stdout, cmd.Stderr = out, out
	// Other programs of the cluster stand beside this one, those of the system may be where only root looks.
	cmd.Env = append(os.Environ(), fmt.Sprintf("PATH=%s:%s:/usr/sbin:/sbin", filepath.Dir(args[0]), os.Getenv("PATH")))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := lastOfThread(func() error {
		if err := m.enter(); err != nil {
			return err
		}
		return cmd.Start()
	}); err != nil {
		return fmt.Errorf("%s on %s: %w", name, m.Name, err)
	}
	task, err := taskOf(cmd.Process.Pid)
	if err != nil {
		return fmt.Errorf("%s on %s: %w", name, m.Name, err)
	}
	go func() { _ = cmd.Wait() }() // no zombie while this process lives
	task.Log, task.Args = log, args
	m.Tasks[name] = task
	return nil
}

// lastOfThread runs f on a thread that ends then, whatever f has made of it. It is never the process's first thread, which does not end before the
// process, and whose mounts and network are shown as the process's.
func lastOfThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
		if unix.Gettid() != os.Getpid() {
			done <- f()
			return
		}
		done <- lastOfThread(f) // while this goroutine holds the first thread, the next one cannot get it
		runtime.UnlockOSThread()
	}()
	return <-done
}

// enter brings the calling thread into the machine; of the PID namespace, what it starts.
func (m *Machine) enter() error {
	fd, err := unix.PidfdOpen(m.Init.PID, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !m.Init.alive() {
		return errors.New("the machine is down")
	}
	if err := unix.Unshare(unix.CLONE_FS); err != nil { // threads that share a root cannot change mount namespaces one by one
		return err
	}
	return unix.Setns(fd, unix.CLONE_NEWNS|unix.CLONE_NEWNET|unix.CLONE_NEWPID|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS)
}

// taskOf reads when a process started: the 22nd field of its stat, the 20th after the name in parentheses (proc_pid_stat(5)).
func taskOf(pid int) (Task, error) {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return Task{}, err
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return Task{}, fmt.Errorf("process %d: stat has %d fields after the name", pid, len(fields))
	}
	if fields[0] == "Z" {
		return Task{}, fmt.Errorf("process %d has ended", pid)
	}
	start, err := strconv.ParseUint(fields[19], 10, 64)
	return Task{PID: pid, Start: start}, err
}

func (t Task) alive() bool {
	now, err := taskOf(t.PID)
	return err == nil && now.Start == t.Start
}

// kill ends the process and waits until it is gone. It is nothing if it has ended.
func (t Task) kill() error {
	fd, err := unix.PidfdOpen(t.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !t.alive() { // the descriptor is of another process
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	deadline := time.Now().Add(2 * patience) // the first process of a machine goes when all others of it have gone
	for left := time.Until(deadline); left > 0; left = time.Until(deadline) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err == nil && n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return fmt.Errorf("process %d does not end", t.PID)
}
