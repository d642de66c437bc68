// Command conformance runs the Kubernetes project's own NetworkPolicy e2e tests, unmodified, against a cluster whose pods have Mantlet's sidecars, and
// writes down what came out (docs/conformance.md, by `make conformance`).
//
//	e2e.test --dry-run ──► names ──► shards of e2e.test, side by side ──► reports ──► table
//	API server ──pods of the tests──► how many had a sidecar
//
// A test that fails, that is skipped without a reason of ours, that was not found, or whose pods had no sidecar makes it exit 1.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/test/cluster/binaries"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	kubeconfig, mode, out, logs, focus, tree string
	shards                                   int
	ask                                      bool
}

func run() error {
	var o options
	flag.StringVar(&o.kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "the cluster; Mantlet is installed there, with injectByDefault")
	flag.StringVar(&o.mode, "mode", "", "what to call this run in the table: how pods are captured, and permissive or strict")
	flag.StringVar(&o.out, "out", "", "file to write the table to; its section about the same mode is replaced")
	flag.StringVar(&o.logs, "logs", "", "folder for the tests' logs and reports; it is made, and stays")
	flag.StringVar(&o.focus, "focus", "NetworkPolicy", "ginkgo's expression of which tests to run")
	flag.IntVar(&o.shards, "shards", 4, "processes of e2e.test at a time")
	flag.StringVar(&o.tree, "tree", "", "what to call what is tested in the table; empty: as -print-tree does")
	flag.BoolVar(&o.ask, "print-tree", false, "print the commit of this working tree, and whether it has changes beside the file -out, and end")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if o.ask {
		t, err := tree(ctx, ".", o.out)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(os.Stdout, t)
		return err
	}
	if o.kubeconfig == "" || o.mode == "" || o.logs == "" {
		return errors.New("-kubeconfig, -mode and -logs are required")
	}
	var err error
	if o.tree == "" {
		if o.tree, err = tree(ctx, ".", o.out); err != nil {
			return err
		}
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	e2e, err := binaries.Path(ctx, log, "e2e.test")
	if err != nil {
		return err
	}
	if o.logs, err = filepath.Abs(o.logs); err != nil {
		return err
	}
	if err := os.MkdirAll(o.logs, 0o755); err != nil {
		return err
	}
	s := suite{program: e2e, kubeconfig: o.kubeconfig, logs: o.logs}
	names, err := s.list(ctx, o.focus)
	if err != nil {
		return err
	}
	names, skipped := excused(names)
	log.Info("tests", "count", len(names), "without", len(skipped), "shards", o.shards)

	watching, stopWatching := context.WithCancel(ctx)
	defer stopWatching()
	client, err := connect(o.kubeconfig)
	if err != nil {
		return err
	}
	server, err := client.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("version of the API server: %w", err)
	}
	seen, err := newCensus(watching, client)
	if err != nil {
		return err
	}
	began := time.Now()
	results := skipped
	shards := make([][]result, o.shards)
	var g errgroup.Group
	for i := range o.shards {
		g.Go(func() (err error) {
			shards[i], err = s.run(ctx, i, every(names, i, o.shards))
			return err
		})
	}
	failed := g.Wait() // what ran is written down all the same
	for _, p := range shards {
		results = append(results, p...)
	}
	r := report{Mode: o.mode, Tree: o.tree, Server: server.GitVersion, Began: began, Took: time.Since(began), Results: results,
		Named: append(names, namesOf(skipped)...), Census: seen.counts()}
	text := r.section()
	_, _ = io.WriteString(os.Stdout, text)
	if o.out != "" {
		if err := replaceSection(o.out, o.mode, text); err != nil {
			return err
		}
	}
	return errors.Join(failed, r.verdict())
}

// every is each of n names, beginning with the i-th: slow tests that stand side by side are spread.
func every(names []string, i, n int) (out []string) {
	for ; i < len(names); i += n {
		out = append(out, names[i])
	}
	return out
}
