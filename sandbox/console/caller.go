package console

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/term"
)

// Call is a program that is to run in a pod of a running sandbox.
type Call struct {
	Sandbox int // process number; see Running
	Pod     string
	Args    []string
	Env     []string
	Dir     string
}

// Run runs a call with the standard input, output and error of this process and returns its exit code. Signals to this process go to
// the program.
func Run(c Call) (exitCode int, err error) {
	return c.run([3]*os.File{os.Stdin, os.Stdout, os.Stderr}, false)
}

// RunTerminal is Run on a terminal, as shells and editors want it: standard input must be one.
func RunTerminal(c Call) (exitCode int, err error) {
	outer := int(os.Stdin.Fd())
	inner, theirs, err := pty.Open()
	if err != nil {
		return 1, fmt.Errorf("make a terminal: %w", err)
	}
	defer func() { _ = inner.Close() }()
	defer func() { _ = theirs.Close() }()
	resize := make(chan os.Signal, 1)
	signal.Notify(resize, syscall.SIGWINCH)
	defer signal.Stop(resize)
	resize <- syscall.SIGWINCH // the first size
	go func() {
		for range resize { // ends with the process: nobody closes the channel
			_ = pty.InheritSize(os.Stdin, inner)
		}
	}()
	state, err := term.MakeRaw(outer)
	if err != nil {
		return 1, fmt.Errorf("make the terminal raw: %w", err)
	}
	defer func() { _ = term.Restore(outer, state) }()
	go func() { _, _ = io.Copy(inner, os.Stdin) }() // blocks in a read until the process ends
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		_, _ = io.Copy(os.Stdout, inner)
	}()
	exitCode, err = c.run([3]*os.File{theirs, theirs, theirs}, true)
	_ = theirs.Close()
	select { // what was written before the end; something that still runs there may hold the terminal open
	case <-shown:
	case <-time.After(lastWords):
	}
	return exitCode, err
}

// lastWords is how long output is shown after the program has ended.
const lastWords = time.Second

func (c Call) run(files [3]*os.File, terminal bool) (exitCode int, err error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: prefix() + strconv.Itoa(c.Sandbox), Net: "unix"})
	if err != nil {
		return 1, fmt.Errorf("no sandbox %d is running: %w", c.Sandbox, err)
	}
	defer func() { _ = conn.Close() }()
	if uid, err := peerUID(conn); err != nil || int(uid) != os.Getuid() {
		return 1, errors.Join(err, fmt.Errorf("sandbox %d is that of user %d; run this as that user", c.Sandbox, uid))
	}
	if err := sendFiles(conn, files); err != nil {
		return 1, err
	}
	out := json.NewEncoder(conn)
	if err := out.Encode(request{Pod: c.Pod, Args: c.Args, Env: c.Env, Dir: c.Dir, Terminal: terminal}); err != nil {
		return 1, err
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer signal.Stop(signals)
	done := make(chan struct{})
	var forwarder sync.WaitGroup
	defer forwarder.Wait()
	defer close(done)
	forwarder.Go(func() {
		for {
			select {
			case s := <-signals:
				_ = out.Encode(order{Signal: s.(syscall.Signal)})
			case <-done:
				return
			}
		}
	})
	var r reply
	if err := json.NewDecoder(conn).Decode(&r); err != nil {
		return 1, fmt.Errorf("the sandbox has ended: %w", err)
	}
	if r.Error != "" {
		return 1, errors.New(r.Error)
	}
	return r.Exit, nil
}
