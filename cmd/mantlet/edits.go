package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/mantlet/mantlet/sandbox"
)

// edits takes a policy away and puts it back, one policy after the other and then from the start, so many changes in all, and reports how
// long each took to be in force.
func (w *world) edits(ctx context.Context, out io.Writer, s *sandbox.Sandbox, n int) error {
	policies := w.manifests.Objects.NetworkPolicies
	if len(policies) == 0 && n > 0 {
		return errors.New("--edits: the manifests have no NetworkPolicy that could be edited")
	}
	var took latencies
	for i := range n {
		next := *w.manifests
		if i%2 == 0 { // every second edit restores
			gone := (i / 2) % len(policies)
			next.Objects.NetworkPolicies = slices.Concat(policies[:gone:gone], policies[gone+1:])
		}
		c, err := s.Update(ctx, &next)
		if err != nil {
			return fmt.Errorf("edit %d: %w", i+1, err)
		}
		took.add(c)
	}
	if n%2 == 1 {
		if _, err := s.Update(ctx, w.manifests); err != nil {
			return err
		}
	}
	took.report(out)
	return nil
}
