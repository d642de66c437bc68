package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
)

// tree names what is in a git working tree: its commit, in 12 digits, and "with changes" where files differ from it or stand beside it. A file that the run itself
// writes does not count; it is named relative to the directory, "": there is none.
func tree(ctx context.Context, directory, but string) (string, error) {
	git := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = directory
		var complaint strings.Builder
		cmd.Stderr = &complaint
		out, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("git %s: %w: %s (where there is no git, say what is tested with -tree)", args[0], err, strings.TrimSpace(complaint.String()))
		}
		return strings.TrimSpace(string(out)), nil
	}
	commit, err := git("rev-parse", "--short=12", "HEAD")
	if err != nil {
		return "", err
	}
	status := []string{"status", "--porcelain", "--", "."}
	if filepath.IsLocal(but) { // else it is not in the tree
		status = append(status, ":(exclude)"+filepath.ToSlash(but))
	}
	changes, err := git(status...)
	if err != nil {
		return "", err
	}
	if changes != "" {
		commit += " with changes"
	}
	return commit, nil
}
