package incluster

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"github.com/mantlet/mantlet/controlplane/inject"
)

// everything is the environment variable whose value "all" has all tests run. Without it only those run that fit into a CI run; the others say
// that they were left out.
const everything = "MANTLET_CLUSTER"

// capture is the environment variable that says in which mode the World is installed: "sidecar", also where it is not set, or "node".
const capture = "MANTLET_CLUSTER_CAPTURE"

// world is what all tests share; nil with -short.
var world *World

// TestMain makes the World, and ends it however the tests end.
func TestMain(m *testing.M) {
	flag.Parse()
	code, err := run(m)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%v\n(go test -short leaves out what needs root)\n", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	if testing.Short() || flag.Lookup("test.list").Value.String() != "" {
		return m.Run(), nil
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	directory, err := os.MkdirTemp("", "mantlet-incluster-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(directory)) }()
	began := time.Now()
	world, err = Up(ctx, Options{Directory: directory, Capture: inject.Capture(os.Getenv(capture)), Log: slog.New(slog.NewTextHandler(os.Stderr, nil))})
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, world.Down()) }()
	stop() // from here on a signal ends the process, and the cluster with it
	fmt.Fprintf(os.Stderr, "incluster: a cluster with Mantlet in %s mode after %.1f s\n", world.Capture, time.Since(began).Seconds())
	return m.Run(), nil
}

// smoke starts a test of those that always run.
func smoke(t *testing.T) *World {
	t.Helper()
	if world == nil {
		t.Skip("needs a whole cluster, made as root; left out because of -short")
	}
	return world
}

// extra starts a test of those that run if all are asked for.
func extra(t *testing.T) *World {
	t.Helper()
	w := smoke(t)
	if os.Getenv(everything) != "all" {
		t.Skip("left out of the CI run for its time: make test-cluster, or " + everything + "=all, runs it")
	}
	return w
}

// nodeMode starts a test of what sidecar mode has not: a daemon and a CNI plugin on the nodes.
func nodeMode(t *testing.T) *World {
	t.Helper()
	w := extra(t)
	if w.Capture != inject.CaptureNode {
		t.Skip("sidecar mode has no daemon and no CNI plugin: make test-cluster CAPTURE=node, or " + capture + "=node, runs it")
	}
	return w
}
