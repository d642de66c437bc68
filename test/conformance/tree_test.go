package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// TestTree: a table says of which commit it is, and that it is of more than that where files differ; the table itself may.
func TestTree(t *testing.T) {
	directory := t.TempDir()
	git := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "git", args...)
		cmd.Dir = directory
		cmd.Env = append(cmd.Environ(), "GIT_CONFIG_GLOBAL="+os.DevNull, "GIT_CONFIG_SYSTEM="+os.DevNull, "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.com",
			"GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.com")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v\n%s", args, err, out)
		}
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(directory, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	is := func(when, want string) {
		t.Helper()
		got, err := tree(t.Context(), directory, "out.md")
		if err != nil || !regexp.MustCompile("^"+want+"$").MatchString(got) {
			t.Errorf("%s: got %q, %v, want %s", when, got, err, want)
		}
	}
	git("init", "-q")
	if got, err := tree(t.Context(), directory, ""); err == nil {
		t.Errorf("without a commit: %q", got)
	}
	write("code", "one")
	write("out.md", "one")
	git("add", ".")
	git("commit", "-q", "-m", "one")
	const commit = "[0-9a-f]{12}"
	is("committed", commit)
	write("out.md", "two")
	is("the table is written anew", commit)
	write("code", "two")
	is("changed", commit+" with changes")
	git("commit", "-q", "-m", "two", "code")
	is("committed again", commit)
	write("more", "one")
	is("a file beside it", commit+" with changes")
}
