package main

import (
	"github.com/spf13/cobra"

	"github.com/mantlet/mantlet/sandbox/matrix"
)

func newSimulate() *cobra.Command {
	var in input
	cmd := &cobra.Command{
		Use:   "simulate -f DIR|FILE…",
		Short: "Say who would reach whom, by the evaluator alone",
		Long: `Simulate reads manifests and says, for every pod and every declared port of every pod and service, whether the connection would
be allowed, whether both ends would be authenticated, and which policy and rule decide. It needs no privileges and no cluster.`,
		Example: "  mantlet simulate -f examples/shop\n  kubectl get ns,pod,svc,netpol -A -o yaml | mantlet simulate -f - -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			w, err := in.read(args, cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			return in.write(cmd.OutOrStdout(), matrix.Simulate(w.index, w.attempts))
		},
	}
	in.register(cmd)
	return cmd
}
