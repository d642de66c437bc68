// Command cluster makes a Kubernetes cluster on this machine, and removes it. Run it from Mantlet's source tree:
//
//	go run ./test/cluster/cmd/cluster up --nodes 2
//	go run ./test/cluster/cmd/cluster down
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/binaries"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var directory string
	root := &cobra.Command{
		Use: "cluster", Short: "A real Kubernetes cluster on this machine, for tests and for trying things out",
		SilenceErrors: true, SilenceUsage: true,
	}
	root.PersistentFlags().StringVar(&directory, "dir", ".cache/cluster", "`directory` of the cluster's state")
	root.AddCommand(up(&directory), down(&directory), status(&directory), load(&directory), execute(&directory), apiserver(&directory), build())
	return root
}

func logger() *slog.Logger { return slog.New(slog.NewTextHandler(os.Stderr, nil)) }

func up(directory *string) *cobra.Command {
	var o cluster.Options
	var dual bool
	c := &cobra.Command{
		Use: "up", Short: "Make a cluster", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o.Directory, o.Log = *directory, logger()
			if dual {
				o.Family = cluster.DualStack
			}
			began := time.Now()
			made, err := cluster.Up(c.Context(), o)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.ErrOrStderr(), "cluster: up in %.1f s\n", time.Since(began).Seconds())
			fmt.Fprintf(c.OutOrStdout(), "export KUBECONFIG=%s\n", made.Kubeconfig())
			return nil
		},
	}
	c.Flags().IntVar(&o.Nodes, "nodes", 2, "`number` of nodes")
	c.Flags().BoolVar(&dual, "dual-stack", false, "give nodes, pods and services IPv6 addresses, too")
	c.Flags().StringSliceVar(&o.DisableAdmission, "disable-admission", nil, "admission `plugins` to switch off, such as PodSecurity")
	c.Flags().StringArrayVar(&o.APIServerFlags, "apiserver-flag", nil, "a further `flag` for kube-apiserver, with its dashes; can be repeated")
	c.Flags().StringArrayVar(&o.Images, "image", nil, "`archive` of an image that all nodes get; can be repeated")
	return c
}

func down(directory *string) *cobra.Command {
	return &cobra.Command{
		Use: "down", Short: "Remove the cluster, and all that it has left on this machine", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return cluster.Remove(*directory) },
	}
}

func status(directory *string) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show what runs, and what does not any more", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			all, err := cluster.Status(*directory)
			if err != nil {
				return err
			}
			out := tabwriter.NewWriter(c.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(out, "MACHINE\tPROGRAM\tPID\tSTATE\tLOG")
			ended := 0
			for _, p := range all {
				state := "runs"
				if !p.Alive {
					state = "ended"
					ended++
				}
				fmt.Fprintf(out, "%s\t%s\t%d\t%s\t%s\n", p.Machine, p.Name, p.PID, state, p.Log)
			}
			if err := out.Flush(); err != nil {
				return err
			}
			if ended > 0 {
				return fmt.Errorf("%d of %d programs have ended\n  hint: their logs say why; cluster down, and up again", ended, len(all))
			}
			return nil
		},
	}
}

func load(directory *string) *cobra.Command {
	return &cobra.Command{
		Use: "load-image ARCHIVE...", Short: "Bring images to all nodes, from archives as docker save or make image write them", Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			running, err := cluster.Open(c.Context(), *directory, logger())
			if err != nil {
				return err
			}
			for _, archive := range args {
				if err := running.LoadImage(c.Context(), archive); err != nil {
					return err
				}
				fmt.Fprintf(c.ErrOrStderr(), "cluster: %s is on all nodes\n", filepath.Base(archive))
			}
			return nil
		},
	}
}

func execute(directory *string) *cobra.Command {
	command := &cobra.Command{
		Use: "exec MACHINE COMMAND...", Short: "Run a program of this machine in a node, or in \"control\"", Args: cobra.MinimumNArgs(2),
		DisableFlagsInUseLine: true,
		RunE: func(c *cobra.Command, args []string) error {
			running, err := cluster.Open(c.Context(), *directory, logger())
			if err != nil {
				return err
			}
			m, err := running.Machine(args[0])
			if err != nil {
				return err
			}
			cmd := m.Command(args[1:]...)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
			err = cmd.Run()
			if exit, ok := err.(*exec.ExitError); ok { //nolint:errorlint // Run returns it as it is
				os.Exit(exit.ExitCode())
			}
			return err
		},
	}
	command.Flags().SetInterspersed(false) // flags after the machine are the program's
	return command
}

func build() *cobra.Command {
	return &cobra.Command{
		Use: "binaries [NAME...]", Short: "Build binaries if they are not in the cache, and write their paths: those of a cluster, or those named, such as e2e.test",
		ValidArgs: binaries.Names(),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = cluster.Binaries()
			}
			log := logger()
			for _, name := range args {
				path, err := binaries.Path(c.Context(), log, name)
				if err != nil {
					return err
				}
				fmt.Fprintln(c.OutOrStdout(), path)
			}
			return nil
		},
	}
}

func apiserver(directory *string) *cobra.Command {
	return &cobra.Command{
		Use: "restart-apiserver", Short: "Stop kube-apiserver and start it anew", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			running, err := cluster.Open(c.Context(), *directory, logger())
			if err != nil {
				return err
			}
			if err := running.StopAPIServer(); err != nil {
				return err
			}
			return running.StartAPIServer(c.Context())
		},
	}
}
