// Command mantlet enforces Kubernetes NetworkPolicy on authenticated identity: `control-plane` does so in a cluster, and `status` shows where; `simulate` asks the evaluator, `sandbox` runs real
// Envoys and real packets on this machine.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// version is set by the build.
var version = "dev"

// exit is an error that asks for an exit code.
type exit struct {
	code int
	err  error
}

func (e *exit) Error() string { return e.err.Error() }
func (e *exit) Unwrap() error { return e.err }

func main() {
	netns.Dispatch()
	root := &cobra.Command{
		Use:           "mantlet",
		Short:         "Kubernetes NetworkPolicy, enforced on authenticated identity",
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(newSimulate(), newSandbox(), newInject(), newInstall(), newUninstall(), newControlPlane(), newStatus(), newCA(), &cobra.Command{
		Use: "version", Short: "Print the version", Args: cobra.NoArgs,
		Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version) },
	})
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w\n  hint: %s --help lists the flags", err, cmd.CommandPath())
	})
	root.Args = func(_ *cobra.Command, args []string) error {
		if len(args) > 0 {
			return fmt.Errorf("unknown command %q\n  hint: mantlet --help lists the commands", args[0])
		}
		return nil
	}
	root.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
	err := root.Execute()
	if err == nil {
		return
	}
	code := 1
	var e *exit
	if errors.As(err, &e) {
		code = e.code
	}
	if text := err.Error(); text != "" {
		fmt.Fprintln(os.Stderr, "error:", text)
	}
	os.Exit(code)
}
