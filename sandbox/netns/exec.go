package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Session is a program that a person runs in a pod.
type Session struct {
	Args                  []string // program, looked for in PATH of Env, and arguments
	Env                   []string // the whole environment
	Dir                   string   // where it starts, if that can be entered
	Stdin, Stdout, Stderr *os.File
	Terminal              bool // Stdin is a terminal, and is to be the program's controlling one
}

// Exit codes of shells for what could not be started.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

// ofMachine are the files that would lead a program to the machine's own names. A pod's process sees others in their place, where the
// machine has them.
var ofMachine = map[string]string{
	"/etc/resolv.conf":   "# names are in /etc/hosts; there is no name server\noptions timeout:1 attempts:1\n",
	"/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}

// Exec runs a program in the pod as its containers run, without capabilities. It has the pod's name for its host name, and sees the
// names that SetHosts has given in /etc/hosts; all other files are the machine's.
func (p *Pod) Exec(ctx context.Context, s Session) (*Process, error) {
	if len(s.Args) == 0 {
		return nil, fmt.Errorf("run something in %s: give a program", p.name)
	}
	if err := p.SetHosts(nil); err != nil {
		return nil, err
	}
	order := execOrder{Args: s.Args, Dir: s.Dir, Host: p.spec.Name, Mounts: map[string]string{"/etc/hosts": p.hostsFile()}, Single: p.network.enclosure.SingleUID}
	for at, text := range ofMachine {
		file := filepath.Join(p.network.enclosure.RunDir, strings.ReplaceAll(at[1:], "/", "-"))
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return nil, fmt.Errorf("run something in %s: %w", p.name, err)
		}
		order.Mounts[at] = file
	}
	text, err := json.Marshal(order)
	if err != nil {
		return nil, err
	}
	return p.Start(ctx, Command{
		Path: "/proc/self/exe", Name: roleExec, Args: []string{string(text)}, Env: s.Env,
		Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr, Terminal: s.Terminal,
		User: Root, Unshare: unix.CLONE_NEWNS | unix.CLONE_NEWUTS,
	})
}

// SetHosts writes the pod's /etc/hosts (hosts(5)); nil leaves it as it is. Programs that run in the pod see the new one.
func (p *Pod) SetHosts(text []byte) error {
	p.hostsMu.Lock()
	defer p.hostsMu.Unlock()
	if text == nil && p.hostsWritten {
		return nil
	}
	// In place: it is the file, not its name, that is mounted.
	if err := os.WriteFile(p.hostsFile(), text, 0o644); err != nil {
		return fmt.Errorf("names for %s: %w", p.name, err)
	}
	p.hostsWritten = true
	return nil
}

func (p *Pod) hostsFile() string {
	return filepath.Join(p.network.enclosure.RunDir, "hosts-"+p.link)
}

// execOrder is what a process of roleExec is told.
type execOrder struct {
	Args   []string          `json:"args"`
	Dir    string            `json:"dir,omitempty"`
	Host   string            `json:"host"`
	Mounts map[string]string `json:"mounts"` // over a file of the machine → file
	Single bool              `json:"single,omitempty"`
}

// execMain makes the program's view of the machine, gives up what an app must not have, and becomes the program.
func execMain() int {
	fail := func(code int, err error) int {
		fmt.Fprintln(os.Stderr, "error:", err)
		return code
	}
	var o execOrder
	if len(os.Args) != 2 || json.Unmarshal([]byte(os.Args[1]), &o) != nil || len(o.Args) == 0 {
		return fail(2, errors.New(roleExec+" is started by mantlet itself"))
	}
	if err := unix.Sethostname([]byte(o.Host)); err != nil {
		return fail(1, fmt.Errorf("set the host name: %w", err))
	}
	for over, file := range o.Mounts {
		err := unix.Mount(file, over, "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) { // a machine without it has nothing to hide
			return fail(1, fmt.Errorf("mount over %s: %w", over, err))
		}
	}
	if o.Dir == "" || os.Chdir(o.Dir) != nil {
		if err := os.Chdir("/"); err != nil {
			return fail(1, err)
		}
	}
	// All of this is about one thread, which becomes the process.
	runtime.LockOSThread()
	if err := become(App, o.Single); err != nil {
		return fail(1, err)
	}
	path, err := exec.LookPath(o.Args[0])
	switch {
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, os.ErrNotExist):
		return fail(exitNotFound, err)
	case err != nil && !errors.Is(err, exec.ErrDot):
		return fail(exitNotExecutable, err)
	}
	return fail(exitNotExecutable, fmt.Errorf("%s: %w", path, syscall.Exec(path, o.Args, os.Environ()))) //nolint:gosec // it is what was asked for
}

// become makes the calling thread one of a user without capabilities. Where only one id is mapped the user stays.
func become(u User, single bool) error {
	if err := renounce(); err != nil {
		return err
	}
	if single {
		return nil
	}
	for _, step := range []struct {
		call uintptr
		args [3]uintptr
	}{
		{unix.SYS_SETGROUPS, [3]uintptr{0, 0, 0}},
		{unix.SYS_SETRESGID, [3]uintptr{uintptr(u.GID), uintptr(u.GID), uintptr(u.GID)}},
		{unix.SYS_SETRESUID, [3]uintptr{uintptr(u.UID), uintptr(u.UID), uintptr(u.UID)}},
	} {
		if _, _, errno := syscall.RawSyscall(step.call, step.args[0], step.args[1], step.args[2]); errno != 0 {
			return fmt.Errorf("become user %d: %w", u.UID, errno)
		}
	}
	return nil
}
