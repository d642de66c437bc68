package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == planeArgument {
		if err := runPlane(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "control plane:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// Sources of objects.
const (
	sourceDirect = "direct"
	sourceAPI    = "api"
)

type options struct {
	n, runs         int
	shape, workload string
	source          string
	output          string
	guard, docs     string
	accept          bool
	profile         string
	only            []string // workloads, where not one or all
}

func run(ctx context.Context, args []string, out io.Writer) error {
	var o options
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.IntVar(&o.n, "n", 1000, "pods with sidecars; a multiple of 10, at least 40")
	flags.IntVar(&o.runs, "runs", 7, "runs of each workload, of which the medians are printed")
	flags.StringVar(&o.shape, "shape", shapeSpread, shapeSpread+", "+shapeOne+" or "+shapeLarge)
	flags.StringVar(&o.workload, "workload", "", "one workload; default: all")
	flags.StringVar(&o.source, "source", sourceDirect, sourceDirect+" (objects are handed to the control plane) or "+sourceAPI+" (etcd and kube-apiserver, which it watches)")
	flags.StringVar(&o.output, "o", "table", "table or json (one object for each workload)")
	flags.StringVar(&o.profile, "profile", "", "folder for profiles (CPU, heap, classes of memory) of the control plane for each workload")
	flags.StringVar(&o.guard, "guard", "", "file of counts that must not be exceeded by more than 15 %")
	flags.BoolVar(&o.accept, "accept", false, "with -guard: write the file")
	flags.StringVar(&o.docs, "docs", "", "folder that gets the table and the plots of docs/performance.md")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if o.n < 40 || o.n%replicas != 0 {
		return fmt.Errorf("-n %d: use a multiple of %d that is at least 40", o.n, replicas)
	}
	if o.source != sourceDirect && (o.source != sourceAPI || o.shape == shapeLarge || o.guard != "") {
		return fmt.Errorf("-source %q: there are %s and, not for -shape %s and -guard, %s", o.source, sourceDirect, shapeLarge, sourceAPI)
	}
	switch {
	case o.guard != "":
		return guard(ctx, o, out)
	case o.docs != "":
		return document(ctx, o, out)
	}
	report, err := reporter(o.output, out)
	if err != nil {
		return err
	}
	return all(ctx, o, report)
}

// all runs the workloads that are asked for, in one cluster, and reports each.
func all(ctx context.Context, o options, report func(sample) error) (err error) {
	names := []string{"compile", "load", "cold-start"}
	var chosen []workload
	for _, w := range workloads {
		names = append(names, w.name)
		if o.wants(w.name) {
			chosen = append(chosen, w)
		}
	}
	if len(chosen) == 0 && !slices.Contains(names[:3], o.workload) {
		return fmt.Errorf("workload %q: there are %s", o.workload, strings.Join(names, ", "))
	}
	if o.workload == "compile" || o.workload == "" && o.shape == shapeLarge {
		s, err := compile(o)
		if err == nil {
			err = report(s)
		}
		if err != nil || o.workload == "compile" {
			return err
		}
	}
	b, err := newBench(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	cold, err := profiled(b, o, "cold-start", func() (sample, error) { return coldStart(b) })
	if err != nil {
		return err
	}
	if o.workload == "" || o.workload == "cold-start" || o.workload == "load" {
		for _, s := range []sample{b.loaded, cold} {
			if err := report(s); err != nil {
				return err
			}
		}
	}
	for _, w := range chosen {
		s, err := profiled(b, o, w.name, func() (sample, error) { return w.measure(b, o.runs) })
		if err != nil {
			return err
		}
		if err := report(s); err != nil {
			return err
		}
	}
	return nil
}

// wants reports whether a workload is to run. In the large cluster only those do that are about policy.
func (o options) wants(name string) bool {
	switch {
	case o.workload != "":
		return o.workload == name
	case o.source == sourceAPI && (name == "rolling-restart" || name == "restart"): // not about the source, and written for objects that are here
		return false
	case len(o.only) > 0:
		return slices.Contains(o.only, name)
	}
	return o.shape != shapeLarge || strings.HasPrefix(name, "policy-")
}

// profiled runs something, with a profile of the control plane where that is asked for. A restart ends the profile with the process.
func profiled(b *bench, o options, name string, run func() (sample, error)) (sample, error) {
	if o.profile == "" || name == "restart" {
		s, err := run()
		s.Workload = name
		return s, err
	}
	if _, err := b.plane.do(command{Op: "profile", Profile: o.profile, Name: name}); err != nil {
		return sample{}, err
	}
	s, err := run()
	if err != nil {
		return s, err
	}
	s.Workload = name
	_, err = b.plane.do(command{Op: "stop-profile"})
	return s, err
}
