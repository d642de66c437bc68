package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// childCapabilities are all that a child has. Package agent says what each is for in a sidecar; DAC_OVERRIDE is the way to the agent's socket, which
// is of another user.
var childCapabilities = []uintptr{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SETUID, unix.CAP_DAC_OVERRIDE}

// stopPatience is between SIGTERM and SIGKILL.
const stopPatience = 2 * time.Second

// runChild runs a child in a pod's network namespace until it ends or ctx does; then it is nil. It ends with this process, too.
func runChild(ctx context.Context, binary string, netns *os.File, pod, volume string, log io.Writer) error {
	cmd := exec.CommandContext(ctx, binary, "netns", "--pod", pod, "--volume", volume)
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=50"} // one for each pod: small rather than fast
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopPatience
	ended := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread has entered the pod, and Pdeathsig is about it
		err := enter(netns)
		if err == nil {
			err = limit(childCapabilities)
		}
		if err == nil {
			err = cmd.Run()
		}
		ended <- err
	}()
	err := <-ended
	if ctx.Err() != nil {
		return nil //nolint:nilerr // what fails at the end is the end
	}
	return err
}

// limit takes all capabilities but those to keep out of the calling thread's bounding set, and so from what it starts.
func limit(keep []uintptr) error {
	for c := uintptr(0); ; c++ {
		if slices.Contains(keep, c) {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // past the last that the kernel knows
			return nil
		}
		if err != nil {
			return fmt.Errorf("limit the child's capabilities (needs CAP_SETPCAP): %w", err)
		}
	}
}
