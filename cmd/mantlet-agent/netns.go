package main

import (
	"context"
	"log/slog"
	"net"
	"os"

	"github.com/spf13/cobra"

	"github.com/mantlet/mantlet/agent"
	"github.com/mantlet/mantlet/agent/node"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// netnsCommand is what the node's daemon starts once for each pod, in the pod's network namespace.
func netnsCommand() *cobra.Command {
	var volume, pod string
	cmd := &cobra.Command{
		Use:    "netns",
		Short:  "Enforce in this process's network namespace, for the agent whose run directory is in a volume",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			useProcessors(1)
			logger := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("pod", pod)
			return agent.Enforce(cmd.Context(), func(ctx context.Context) (net.Conn, proxyuser.User, error) { return node.Await(ctx, volume) }, logger)
		},
	}
	cmd.Flags().StringVar(&volume, "volume", "", "the folder of the pod's "+node.Volume+" volume on the node")
	cmd.Flags().StringVar(&pod, "pod", "", "the pod, as namespace/name, for the log")
	for _, name := range []string{"volume", "pod"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err)
		}
	}
	return cmd
}
