package main

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/agent/node"
)

// nodeFlags are where things are on the node.
type nodeFlags struct {
	stateDir, kubeletRoot, binDir, confDir string
}

func (f *nodeFlags) installation() (i node.Installation, err error) {
	binary, err := os.Executable()
	return node.Installation{BinDir: f.binDir, ConfDir: f.confDir, Binary: binary, StateDir: f.stateDir, KubeletRoot: f.kubeletRoot}, err
}

func nodeCommand() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use:   "node",
		Short: "Enforce for the pods of this node whose sidecars run with --capture node, until SIGTERM",
		Long: `Enforce for the pods of this node whose sidecars run with --capture node, until SIGTERM.

Installs the CNI plugin ` + node.PluginName + `, which closes pods before they start, and keeps it installed. What is in force
stays in force when this process ends.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger := slog.New(slog.NewTextHandler(os.Stderr, nil))
			i, err := f.installation()
			if err != nil {
				return err
			}
			parts, ctx := errgroup.WithContext(cmd.Context())
			parts.Go(func() error { i.Keep(ctx, logger); return nil })
			parts.Go(func() error {
				return node.Run(ctx, node.Config{StateDir: f.stateDir, KubeletRoot: f.kubeletRoot, Binary: i.Binary, ChildLog: os.Stderr, Logger: logger})
			})
			return parts.Wait()
		},
	}
	flags := cmd.PersistentFlags()
	flags.StringVar(&f.stateDir, "state-dir", "/run/mantlet/node", "folder for what the CNI plugin leaves for this process; must not outlive a reboot")
	flags.StringVar(&f.kubeletRoot, "kubelet-root", "/var/lib/kubelet", "the kubelet's --root-dir")
	flags.StringVar(&f.binDir, "cni-bin-dir", "/opt/cni/bin", "folder of the container runtime's CNI plugins")
	flags.StringVar(&f.confDir, "cni-conf-dir", "/etc/cni/net.d", "folder of its CNI configurations")
	cmd.AddCommand(uninstallNode(&f))
	return cmd
}

func uninstallNode(f *nodeFlags) *cobra.Command {
	var stay bool
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take the CNI plugin out of the node's configuration again",
		Long: `Take the CNI plugin out of the node's configuration again, in the place of the daemon, which would put it back. With --stay this process does what a
DaemonSet does on each node: mantlet install --set node.plugin=removed writes one.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i, err := f.installation()
			if err != nil {
				return err
			}
			if err := i.Uninstall(); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), "uninstalled; pods that run keep their enforcement, and learn of no change to it")
			if stay {
				<-cmd.Context().Done()
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&stay, "stay", false, "then wait for SIGTERM")
	return cmd
}

// asPlugin reports whether a container runtime has started this process as its CNI plugin.
func asPlugin() bool { return filepath.Base(os.Args[0]) == node.PluginName }
