package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/mantlet/mantlet/agent"
)

func readyCommand() *cobra.Command {
	return question(agent.Ready, "ready", "Exit 0 if the pod is enforced, 1 with what is missing if it is not")
}

func startedCommand() *cobra.Command {
	return question(agent.Started, "started", "Exit 0 once the pod's other containers may start, 1 with what is missing if that takes too long")
}

// question is a command that asks the agent something, and waits for its answer.
func question(ask func(ctx context.Context, runDir string, wait time.Duration) error, name, short string) *cobra.Command {
	var runDir string
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   name,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := ask(cmd.Context(), runDir, wait); err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), "ready")
			return nil
		},
	}
	cmd.Flags().StringVar(&runDir, "run-dir", "", "the agent's folder")
	cmd.Flags().DurationVar(&wait, "wait", 0, "how long to wait for it")
	if err := cmd.MarkFlagRequired("run-dir"); err != nil {
		panic(err)
	}
	return cmd
}
