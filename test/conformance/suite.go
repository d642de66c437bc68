package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// suite is the upstream project's test binary.
type suite struct{ program, kubeconfig, logs string }

// result is what became of one test.
type result struct {
	Name    string
	State   string // ginkgo's: passed, failed, skipped, timedout, …
	Took    time.Duration
	Message string // of a failure or a skip
}

// specReport is what is read of ginkgo's JSON report.
type specReport struct {
	SpecReports []struct {
		ContainerHierarchyTexts []string
		LeafNodeText            string
		LeafNodeType            string
		State                   string
		RunTime                 time.Duration
		Failure                 struct{ Message string }
	}
}

// list returns the names of the tests that an expression finds.
func (s suite) list(ctx context.Context, focus string) ([]string, error) {
	path := filepath.Join(s.logs, "list.json")
	if out, err := s.command(ctx, "--ginkgo.dry-run", "--ginkgo.focus="+focus, "--ginkgo.json-report="+path).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("list tests: %w\n%s", err, out)
	}
	results, err := read(path)
	var names []string
	for _, r := range results {
		if r.State == "passed" {
			names = append(names, r.Name)
		}
	}
	if err == nil && len(names) == 0 {
		err = fmt.Errorf("no test is called %q", focus)
	}
	return names, err
}

// run runs tests one after the other.
func (s suite) run(ctx context.Context, shard int, names []string) ([]result, error) {
	if len(names) == 0 {
		return nil, nil
	}
	focus := make([]string, len(names))
	for i, n := range names {
		focus[i] = regexp.QuoteMeta(n) + "$"
	}
	report := filepath.Join(s.logs, fmt.Sprintf("%d.json", shard))
	log, err := os.Create(filepath.Join(s.logs, fmt.Sprintf("%d.log", shard)))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := s.command(ctx, "--ginkgo.v", "--ginkgo.timeout=60m", "--ginkgo.focus="+strings.Join(focus, "|"), "--ginkgo.json-report="+report)
	cmd.Stdout, cmd.Stderr = log, log
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) { // else the report says which failed
		return nil, err
	}
	all, err := read(report)
	if err != nil {
		return nil, fmt.Errorf("shard %d: %w (see %s)", shard, err, log.Name())
	}
	mine := map[string]bool{}
	for _, n := range names {
		mine[n] = true
	}
	var out []result
	for _, r := range all {
		if mine[r.Name] {
			out = append(out, r)
		}
	}
	return out, nil
}

func (s suite) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, s.program, append([]string{"--provider=skeleton", "--kubeconfig=" + s.kubeconfig, "--ginkgo.no-color"}, args...)...)
	cmd.Dir = s.logs
	return cmd
}

func read(path string) (out []result, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var reports []specReport
	if err := json.Unmarshal(b, &reports); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for _, r := range reports {
		for _, s := range r.SpecReports {
			if s.LeafNodeType == "It" {
				name := strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
				out = append(out, result{name, s.State, s.RunTime, s.Failure.Message})
			}
		}
	}
	return out, nil
}
