package console

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// A Host runs programs in pods; *sandbox.Sandbox is one. The process is killed when ctx ends.
type Host interface {
	Exec(ctx context.Context, pod string, s netns.Session) (*netns.Process, error)
}

// Serve lets callers into the pods of a host, until ctx ends; what they run is killed then. The file is what Listen returned.
func Serve(ctx context.Context, file *os.File, h Host, log *slog.Logger) error {
	l, err := net.FileListener(file)
	if err != nil {
		return fmt.Errorf("open the sandbox's console: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	defer func() { _ = l.Close() }()
	var callers sync.WaitGroup
	defer callers.Wait()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil //nolint:nilerr // this is how it ends
		}
		if err != nil {
			return fmt.Errorf("the sandbox's console: %w", err)
		}
		callers.Go(func() {
			if err := attend(ctx, conn.(*net.UnixConn), h); err != nil {
				log.Warn("console: caller turned away", "error", err)
			}
		})
	}
}

// attend does what one caller asks. The error is for the log; what concerns the caller the caller is told.
func attend(ctx context.Context, conn *net.UnixConn, h Host) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer func() { _ = conn.Close() }()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	// Whose sandbox it is is 0 in here: root himself, or the user who is mapped to root.
	if uid, err := peerUID(conn); err != nil || uid != 0 {
		return errors.Join(err, fmt.Errorf("it belongs to another user (%d in the sandbox)", uid))
	}
	files, err := receiveFiles(conn)
	if err != nil {
		return err
	}
	limited := &io.LimitedReader{R: conn, N: maxRequest}
	in := json.NewDecoder(limited)
	var r request
	if err := in.Decode(&r); err != nil {
		closeAll(files)
		return fmt.Errorf("its request cannot be read: %w", err)
	}
	p, err := h.Exec(ctx, r.Pod, netns.Session{
		Args: r.Args, Env: r.Env, Dir: r.Dir, Stdin: files[0], Stdout: files[1], Stderr: files[2], Terminal: r.Terminal,
	})
	closeAll(files) // the process has its own
	out := json.NewEncoder(conn)
	if err != nil {
		return out.Encode(reply{Error: err.Error()})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			limited.N = maxRequest
			var o order
			if in.Decode(&o) != nil {
				p.Kill() // the caller is gone, and with it whoever wanted this; or the process has ended
				return
			}
			_ = p.Signal(o.Signal)
		}
	}()
	err = out.Encode(reply{Exit: exitCode(p.Wait())})
	_ = conn.Close()
	<-done
	return err
}

func closeAll(files [3]*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// exitCode is what a shell says of a process: 128 plus the signal that ended it.
func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case !errors.As(err, &exit):
		return 1
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return 128 + int(status.Signal())
	}
	return exit.ExitCode()
}
