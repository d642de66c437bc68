package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/console"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// passedOn are the variables of the caller that a program in a pod gets; the rest is about the caller's own machine.
var passedOn = []string{"PATH", "TERM", "COLORTERM", "LANG", "LC_ALL", "NO_COLOR"}

// entry holds the flags of exec and shell.
type entry struct {
	sandbox   int
	namespace string
}

func (e *entry) register(cmd *cobra.Command) {
	cmd.Flags().IntVar(&e.sandbox, "sandbox", 0, "which sandbox, by its process number, where several are running")
	cmd.Flags().StringVarP(&e.namespace, "namespace", "n", "", "namespace of the pod, unless POD names it")
}

func newExec() *cobra.Command {
	var e entry
	cmd := &cobra.Command{
		Use:   "exec POD -- COMMAND [ARGS…]",
		Short: "Run a command in a pod of the sandbox that runs with --watch",
		Long: `Exec runs a command in a pod of the sandbox that runs with --watch in another terminal: in the pod's network, behind its sidecar,
as an unprivileged user, as an app in the pod would. Names of pods and Services resolve. It ends with the command's exit code.`,
		Example: "  mantlet sandbox exec shop/web-0 -- curl -sS http://api:8080/\n  mantlet sandbox exec web-0 -n shop -- getent hosts db",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 || cmd.ArgsLenAtDash() != 1 { // as kubectl: all after the dashes is the command's
				return errors.New("exec wants a pod and a command\n  hint: mantlet sandbox exec shop/web-0 -- getent hosts api")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error { return e.run(args[0], args[1:], console.Run) },
	}
	e.register(cmd)
	return cmd
}

func newShell() *cobra.Command {
	var e entry
	cmd := &cobra.Command{
		Use:     "shell POD",
		Short:   "Open a shell in a pod of the sandbox that runs with --watch",
		Long:    "Shell is exec with a shell on this terminal.",
		Example: "  mantlet sandbox shell shop/web-0",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return errors.New("shell wants one pod\n  hint: mantlet sandbox shell shop/web-0")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error {
			run := console.Run
			if term.IsTerminal(int(os.Stdin.Fd())) {
				run = console.RunTerminal
			}
			return e.run(args[0], []string{shell()}, run)
		},
	}
	e.register(cmd)
	return cmd
}

func shell() string {
	if _, err := os.Stat("/bin/bash"); err == nil {
		return "/bin/bash"
	}
	return "/bin/sh"
}

func (e *entry) run(pod string, args []string, run func(console.Call) (int, error)) error {
	if e.namespace != "" {
		if ns, _, full := strings.Cut(pod, "/"); full && ns != e.namespace {
			return fmt.Errorf("pod %s is not in namespace %s\n  hint: leave out -n, or the namespace in the name", pod, e.namespace)
		} else if !full {
			pod = e.namespace + "/" + pod
		}
	}
	number, err := e.find()
	if err != nil {
		return err
	}
	c := console.Call{Sandbox: number, Pod: pod, Args: args, Env: []string{"HOME=/tmp", "USER=app"}}
	for _, name := range passedOn {
		if value, ok := os.LookupEnv(name); ok {
			c.Env = append(c.Env, name+"="+value)
		}
	}
	if c.Dir, err = os.Getwd(); err != nil {
		c.Dir = "/"
	}
	code, err := run(c)
	switch {
	case err != nil:
		return err
	case code != 0:
		return &exit{code, errors.New("")} // the command has said why
	}
	return nil
}

func (e *entry) find() (int, error) {
	if e.sandbox != 0 {
		return e.sandbox, nil
	}
	running, err := console.Running()
	switch {
	case err != nil:
		return 0, err
	case len(running) == 0:
		return 0, errors.New("no sandbox is running\n  hint: start one in another terminal: mantlet sandbox -f DIR --watch")
	case len(running) > 1:
		return 0, fmt.Errorf("%d sandboxes are running\n  hint: say which, with --sandbox and one of %s", len(running), strings.Trim(fmt.Sprint(running), "[]"))
	}
	return running[0], nil
}

// serveConsole lets exec and shell in. The function that it returns ends that, and waits for its end.
func serveConsole(ctx context.Context, s *sandbox.Sandbox, log *slog.Logger) (end func() error) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		files := netns.Inherited()
		if len(files) != 1 {
			done <- nil
			return
		}
		done <- console.Serve(ctx, files[0], s, log)
	}()
	return func() error {
		cancel()
		return <-done
	}
}
