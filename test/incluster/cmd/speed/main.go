// Command speed measures what Mantlet costs in a cluster, and writes it down as docs/kubernetes-speed.md (`make cluster-speed`).
//
//	World of two nodes ──► pods with and without sidecar, by turns: to Ready
//	                   ──► 50 pods: a NetworkPolicy is written: to the last ACK
//	                   ──► the same 50 pods, left alone: memory and CPU of agents and Envoys
//
// The cluster, the pods and this command share one machine: figures are only worth something where nobody else uses it, so the load that there was
// is written down too.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/test/incluster"
)

// options are the flags.
type options struct {
	out                 string
	capture             inject.Capture
	pairs, writes, pods int
	idle                time.Duration
}

func main() {
	o := options{capture: inject.CaptureSidecar}
	flag.StringVar(&o.out, "out", "", "file to write; empty: standard output")
	flag.Func("capture", "how pods are captured: sidecar (the default), or node", o.setCapture)
	flag.IntVar(&o.pairs, "pairs", 15, "pods with and pods without sidecar that are started, by turns")
	flag.IntVar(&o.writes, "writes", 200, "writes of a NetworkPolicy")
	flag.IntVar(&o.pods, "pods", 50, "pods with sidecars when policies are written, and when nothing happens")
	flag.DurationVar(&o.idle, "idle", time.Minute, "how long CPU is counted while nothing happens")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "speed:", err)
		os.Exit(1)
	}
}

// setCapture takes a mode by its name.
func (o *options) setCapture(name string) error {
	switch c := inject.Capture(name); c {
	case inject.CaptureSidecar, inject.CaptureNode:
		o.capture = c
		return nil
	}
	return fmt.Errorf("%s or %s", inject.CaptureSidecar, inject.CaptureNode)
}

func run(o options) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	directory, err := os.MkdirTemp("", "mantlet-speed-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(directory)) }()
	w, err := incluster.Up(ctx, incluster.Options{Directory: directory, Capture: o.capture, Log: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Down()) }()
	d := document{Options: o, Machine: thisMachine()}
	log.Info("starting pods", "pairs", o.pairs)
	if d.Starts, err = startPods(ctx, w, o.pairs); err != nil {
		return err
	}
	log.Info("started", "difference", d.Starts.difference().String())
	if err := populate(ctx, w, o.pods); err != nil {
		return err
	}
	log.Info("writing policies", "pods", o.pods, "writes", o.writes)
	if d.Writes, err = writePolicies(ctx, w, o.writes); err != nil {
		return err
	}
	log.Info("written", "to_ack", d.Writes.ToACK.String())
	log.Info("leaving all alone", "for", o.idle)
	if d.Idle, err = watchIdle(ctx, w, o.idle); err != nil {
		return err
	}
	d.Machine.After = load()
	text := d.text()
	if o.out == "" {
		_, err = os.Stdout.WriteString(text)
		return err
	}
	return os.WriteFile(o.out, []byte(text), 0o644)
}
