package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// keepProfiles measures two workloads once more, with profiles, and writes what they show as text: the profiles themselves are of use with the very binary only.
// It is a run of its own, so that no profile is in the table's figures.
func keepProfiles(ctx context.Context, o options) (err error) {
	folder, err := os.MkdirTemp("", "mantlet-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(folder)) }()
	o.shape, o.workload, o.profile = shapeSpread, "policy-update", folder
	if o.runs < profiledChanges {
		o.runs = profiledChanges
	}
	if err := all(ctx, o, func(sample) error { return nil }); err != nil {
		return err
	}
	for _, workload := range []string{"cold-start", "policy-update"} {
		var text strings.Builder
		fmt.Fprintf(&text, "The control plane with %d sidecars (spread), as `go run ./test/bench -docs %s` finds it.\n", o.n, o.docs)
		for _, list := range []struct {
			what string
			args []string
		}{
			{"CPU, by function with what it calls", []string{"-cum", workload + ".cpu"}},
			{"CPU, by function alone", []string{workload + ".cpu"}},
			{"heap in use when it was over, by who made it", []string{"-sample_index=inuse_space", workload + ".heap"}},
		} {
			args := append([]string{"tool", "pprof", "-top", "-nodecount=40"}, list.args...)
			cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // of names above
			cmd.Dir, cmd.Stderr = folder, nil
			top, err := cmd.Output()
			if err != nil {
				return fmt.Errorf("go %s: %w", strings.Join(args, " "), err)
			}
			fmt.Fprintf(&text, "\n## %s\n\n%s", list.what, top)
		}
		name := filepath.Join(o.docs, "profile-"+workload+".txt")
		if err := os.WriteFile(name, []byte(text.String()), 0o644); err != nil { //nolint:gosec // documentation
			return err
		}
	}
	return nil
}

// profiledChanges make a profile of a second or so.
const profiledChanges = 200
