package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// namespaces are all that the enclosure has of its own. The user namespace comes on top for ordinary users.
const namespaces = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS

// forwarded are the signals that reach the inner command when they are sent to the outer one.
var forwarded = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT}

// Messages between the outer process and init, JSON, one way each.
type (
	toInit struct {
		Go     bool           `json:"go,omitempty"`     // ids are mapped: go on
		Files  int            `json:"files,omitempty"`  // for the inner command, from file descriptor 4 on
		Signal syscall.Signal `json:"signal,omitempty"` // was sent to the outer process
	}
	fromInit struct {
		Started bool   `json:"started,omitempty"`
		Error   string `json:"error,omitempty"`
	}
)

// Reenter runs this executable once more with argv inside fresh namespaces and waits for it. Standard input, output and error, the
// working directory and the environment are passed through; SIGINT, SIGTERM, SIGHUP and SIGQUIT reach the inner command once each.
// It returns the exit code of the inner command, 128 plus the signal if one ended it. When it returns, no process is left inside.
//
// The inner command gets files too; it asks for them with Inherited.
//
// Without root it makes a user namespace too: with every id of the user's range in /etc/subuid and /etc/subgid if newuidmap and
// newgidmap can map them, else with the user's own id alone (Enclosure.SingleUID).
func Reenter(argv []string, files ...*os.File) (exitCode int, err error) {
	switch {
	case !dispatched:
		return 1, errors.New("enter the sandbox's namespaces: main has to call netns.Dispatch first")
	case inside:
		return 1, errors.New("enter the sandbox's namespaces: already inside")
	case len(argv) == 0:
		return 1, errors.New("enter the sandbox's namespaces: no arguments")
	}
	// The kernel sends the death signal when the *thread* ends that made the child, so this one has to last.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)

	var failed error
	for _, m := range mappings() {
		code, err := enter(argv, files, m, signals)
		if err == nil {
			return code, nil
		}
		failed = err
	}
	return 1, explain(failed)
}

// enter starts init under one mapping of ids. It fails only before the inner command has started.
func enter(argv []string, files []*os.File, ids mapping, signals <-chan os.Signal) (exitCode int, err error) {
	control, theirs, err := socketPair("control")
	if err != nil {
		return 1, err
	}
	defer func() { _ = control.Close() }()

	cmd := exec.CommandContext(context.Background(), "/proc/self/exe") // as long as it takes: signals end it
	cmd.Args = append([]string{roleInit}, argv...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = append([]*os.File{theirs}, files...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: namespaces, Pdeathsig: syscall.SIGKILL}
	ids.prepare(cmd.SysProcAttr)
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		return 1, fmt.Errorf("make namespaces: %w", err)
	}
	if err := ids.apply(cmd.Process.Pid); err != nil {
		_ = control.Close() // init has waited for word and ends
		_ = cmd.Wait()
		return 1, err
	}

	stop := make(chan struct{})
	forwarder := make(chan struct{})
	go func() {
		defer close(forwarder)
		send := json.NewEncoder(control)
		_ = send.Encode(toInit{Go: true, Files: len(files)})
		for {
			select {
			case s := <-signals:
				_ = send.Encode(toInit{Signal: s.(syscall.Signal)})
			case <-stop:
				return
			}
		}
	}()
	report := make(chan fromInit, 1)
	go func() {
		var r fromInit
		_ = json.NewDecoder(control).Decode(&r)
		report <- r
	}()
	waitErr := cmd.Wait()
	close(stop)
	<-forwarder

	r := <-report // init is dead, so its end of the socket is closed: there is an answer or an end
	var exit *exec.ExitError
	switch {
	case r.Error != "":
		return 1, errors.New(r.Error)
	case waitErr != nil && !errors.As(waitErr, &exit):
		return 1, fmt.Errorf("wait for the sandbox: %w", waitErr)
	}
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case !r.Started:
		return 1, fmt.Errorf("the first process of the sandbox ended (%s) before it had started the command", cmd.ProcessState)
	case status.Signaled():
		return 128 + int(status.Signal()), nil
	}
	return status.ExitStatus(), nil
}

// socketPair returns two ends of a stream that are closed on exec; the first is for this process and can be read with others waiting.
func socketPair(name string) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), nil
}

// inheritedSocket returns the end of a socket pair that the parent has passed as file descriptor 3.
func inheritedSocket(name string) (*os.File, error) {
	const fd = 3
	if kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN); err != nil || kind != unix.AF_UNIX {
		return nil, errors.New("this command is started by mantlet itself")
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	return os.NewFile(fd, name), nil
}
