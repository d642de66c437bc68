package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/mantlet/mantlet/agent"
)

func readyCommand() *cobra.Command {
	var runDir string
	var wait time.Duration
	cmd := &cobra.Command{
		Use:   "ready",
		Short: "Exit 0 if the pod is enforced, 1 with what is missing if it is not",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := agent.Ready(cmd.Context(), runDir, wait); err != nil {
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
