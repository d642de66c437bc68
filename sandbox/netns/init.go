package netns

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// initMain is PID 1 of the enclosure: it prepares the mounts, starts the inner command, reaps whatever is orphaned, forwards signals and
// ends with the inner command's exit code, upon which the kernel ends everything else.
//
// It is a process of its own so that reaping *any* child cannot take an exit status away from os/exec in the inner command, and so
// that the inner command is killed by signals that it does not handle, which PID 1 never is.
func initMain() int {
	control, err := inheritedSocket("control")
	if err != nil || os.Getpid() != 1 {
		fmt.Fprintf(os.Stderr, "%s is started by mantlet itself, as the first process of its namespaces\n", roleInit)
		return 2
	}
	report := json.NewEncoder(control)
	orders := json.NewDecoder(control)
	fail := func(err error) int {
		_ = report.Encode(fromInit{Error: err.Error()})
		return 125
	}

	var order toInit
	if err := orders.Decode(&order); err != nil || !order.Go {
		return 125 // the outer process gave up
	}
	if err := prepareMounts(); err != nil {
		return fail(err)
	}
	if err := unix.Sethostname([]byte("mantlet-sandbox")); err != nil {
		return fail(fmt.Errorf("set the host name of the sandbox: %w", err))
	}
	for i := range order.Files {
		unix.CloseOnExec(firstFile + 1 + i)
	}
	own := make(chan os.Signal, 16)
	signal.Notify(own, append([]os.Signal{marker}, forwarded...)...)

	// Neither os/exec nor os.StartProcess: both keep a handle that wants to wait for the child.
	files := []uintptr{0, 1, 2}
	for i := range order.Files {
		files = append(files, firstFile+1+uintptr(i)) // one further here: the socket to the outer process comes first
	}
	inner, err := syscall.ForkExec("/proc/self/exe", append([]string{roleInner, strconv.Itoa(order.Files)}, os.Args[1:]...),
		&syscall.ProcAttr{Env: os.Environ(), Files: files})
	if err != nil {
		return fail(fmt.Errorf("start the command inside the sandbox: %w", err))
	}
	_ = report.Encode(fromInit{Started: true})

	asked := make(chan syscall.Signal)
	go func() {
		for {
			var order toInit
			if orders.Decode(&order) != nil {
				os.Exit(128 + int(syscall.SIGKILL)) // the outer process is gone
			}
			if order.Signal != 0 {
				asked <- order.Signal
			}
		}
	}()
	go forwardSignals(own, asked, func(s syscall.Signal) { _ = syscall.Kill(inner, s) })
	return reap(inner)
}

// reap waits for every child, adopted ones included, until the inner command ends.
func reap(inner int) (exitCode int) {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil: // no children: cannot be, the inner one is reaped below
			return 125
		case pid != inner:
		case status.Exited():
			return status.ExitStatus()
		case status.Signaled():
			return 128 + int(status.Signal())
		}
	}
}

const (
	// sameSignal is how far apart the two copies of one keystroke are at most: that from the terminal, and that by way of the outer process.
	sameSignal = 2 * time.Second
	// marker is a signal that init sends to itself. It has a higher number than the forwarded ones, so that it is delivered after those
	// that were there before it.
	marker = syscall.Signal(50)
)

// forwardSignals delivers what the outer process was sent. A terminal sends Ctrl-C to the whole foreground group: then outer, init and
// inner all have it already, and forwarding would make it two, which many programs take for "at once!". init is in that group, so what
// reaches itself has reached inner too.
//
// own has the forwarded signals and the marker.
func forwardSignals(own <-chan os.Signal, asked <-chan syscall.Signal, deliver func(syscall.Signal)) {
	lastOwn := map[os.Signal]time.Time{}
	for {
		select {
		case s := <-own:
			lastOwn[s] = time.Now()
		case s := <-asked:
			// By the time that the outer process has told of a signal to the group, this process has it too, perhaps still on the way.
			_ = syscall.Kill(os.Getpid(), marker)
			for o := range own {
				if o == marker {
					break
				}
				lastOwn[o] = time.Now()
			}
			if at, ok := lastOwn[s]; ok && time.Since(at) < sameSignal {
				delete(lastOwn, s)
				continue
			}
			deliver(s)
		}
	}
}

// runRoots are the directories over which the run directory's tmpfs may be mounted: those that exist everywhere and hold nothing that the
// command's arguments could name. /dev/shm comes first because a private one belongs to a private IPC namespace anyway.
var runRoots = []string{"/dev/shm", "/run"}

const mountSource = "mantlet-sandbox"

// runDir finds where init has mounted the run directory.
func runDir() string {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return ""
	}
	for _, root := range runRoots {
		if strings.Contains("\n"+string(mounts), "\n"+mountSource+" "+root+" tmpfs ") {
			return filepath.Join(root, "mantlet")
		}
	}
	return ""
}

// prepareMounts makes the mount namespace private and mounts what belongs to the enclosure: /proc of its PID namespace, the run directory.
func prepareMounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make the mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc of the sandbox: %w", err)
	}
	var failed error
	for _, root := range runRoots {
		if err := unix.Mount(mountSource, root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
			failed = err
			continue
		}
		// 0711: unprivileged processes reach the sockets that they are given the path of.
		dir := filepath.Join(root, "mantlet")
		if err := errors.Join(os.Mkdir(dir, 0o711), os.Chmod(dir, 0o711)); err != nil { // Mkdir alone obeys the umask
			return fmt.Errorf("make the run directory: %w", err)
		}
		return nil
	}
	return fmt.Errorf("mount a run directory over %v: %w", runRoots, failed)
}
