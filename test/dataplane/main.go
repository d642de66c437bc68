package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/netns"
)

func main() {
	netns.Dispatch()
	if len(os.Args) == 3 && os.Args[1] == appArgument {
		fail(runApp(os.Args[2], os.Stdin, os.Stdout))
		return
	}
	o, err := parse(os.Args[1:])
	if err != nil {
		fail(err)
	}
	if !netns.Inside() {
		code, err := outside()
		fail(err)
		os.Exit(code)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b, err := sandbox.FindBinaries()
	fail(err)
	fail(run(ctx, o, b, os.Stdout))
}

func fail(err error) {
	switch {
	case err == nil:
	case errors.Is(err, flag.ErrHelp):
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "dataplane:", err)
		os.Exit(1)
	}
}

// outside builds the agent as it is shipped, unless $MANTLET_AGENT names one, and goes on inside namespaces, where nothing can be fetched. The
// agent is taken away again.
func outside() (code int, err error) {
	if os.Getenv("MANTLET_AGENT") == "" {
		dir, terr := os.MkdirTemp("", "mantlet-dataplane-")
		if terr != nil {
			return 1, terr
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		agent := filepath.Join(dir, "mantlet-agent")
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop() // twice does no harm: inside, signals are Reenter's to pass on
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", agent, "./cmd/mantlet-agent")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, failed := build.CombinedOutput()
		stop()
		if failed != nil {
			return 1, fmt.Errorf("build the agent: %w\n%s  hint: run this in the folder of go.mod", failed, out)
		}
		if err := os.Setenv("MANTLET_AGENT", agent); err != nil {
			return 1, err
		}
	}
	if _, err := sandbox.FindBinaries(); err != nil {
		return 1, err
	}
	return netns.Reenter(os.Args)
}

type options struct {
	rounds   int
	each     time.Duration
	variants string
	traffic  string
	output   string
	docs     string
}

func parse(args []string) (options, error) {
	var o options
	flags := flag.NewFlagSet("dataplane", flag.ContinueOnError)
	flags.IntVar(&o.rounds, "rounds", 9, "rounds, of which the medians are taken")
	flags.DurationVar(&o.each, "for", 500*time.Millisecond, "how long each kind of traffic goes through each variant in a round")
	flags.StringVar(&o.variants, "variants", "", "variants by name, with commas; default: all")
	flags.StringVar(&o.traffic, "traffic", "", "kinds of traffic by name, with commas; default: all")
	flags.StringVar(&o.output, "o", "table", "table or json")
	flags.StringVar(&o.docs, "docs", "", "folder that gets dataplane.md of docs/performance.md")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if flags.NArg() > 0 {
		return o, fmt.Errorf("argument %q: there are only flags", flags.Arg(0))
	}
	if o.rounds < 1 || o.rounds > 1000 || o.each < time.Millisecond || o.each > time.Minute {
		return o, fmt.Errorf("-rounds %d -for %s: use 1 to 1000 rounds of 1ms to 1m", o.rounds, o.each)
	}
	if o.output != "table" && o.output != "json" {
		return o, fmt.Errorf("-o %q: there are table and json", o.output)
	}
	_, err := choose(o.variants)
	_, terr := chooseSteps(o.traffic)
	return o, errors.Join(err, terr)
}

// run measures, inside the enclosure, and reports.
func run(ctx context.Context, o options, b sandbox.Binaries, out io.Writer) error {
	chosen, err := choose(o.variants)
	if err != nil {
		return err
	}
	f, err := measured(ctx, o, chosen, b)
	if err != nil {
		return err
	}
	if o.docs != "" {
		if err := document(o, f); err != nil {
			return err
		}
	}
	return report(o.output, f, out)
}

func measured(ctx context.Context, o options, chosen []variant, b sandbox.Binaries) (f figures, err error) {
	traffic, err := chooseSteps(o.traffic)
	if err != nil {
		return f, err
	}
	before := load()
	fmt.Fprintf(os.Stderr, "starting %d variants\n", len(chosen))
	w, err := build(ctx, chosen, b)
	if err != nil {
		return f, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	m, err := w.measure(ctx, o.rounds, o.each, traffic, func(done, of int) { fmt.Fprintf(os.Stderr, "round %d of %d, load %s\n", done, of, load()) })
	if err != nil {
		return f, err
	}
	f = conclude(chosen, m)
	f.CPUs, f.LoadBefore, f.LoadAfter = runtime.NumCPU(), before, load()
	return f, nil
}

// load is the machine's, of the last 1, 5 and 15 minutes.
func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(text))[:3], " ")
}

// document writes the file that docs/performance.md refers to.
func document(o options, f figures) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Measured with `go run ./test/dataplane -docs %s`: %d CPUs, which clients, servers and proxies share; medians of %d rounds; load before %s, after %s.\n",
		o.docs, f.CPUs, f.Rounds, f.LoadBefore, f.LoadAfter)
	for _, t := range tables(f) {
		b.WriteString("\n" + t.markdown())
	}
	if err := os.MkdirAll(o.docs, 0o755); err != nil { //nolint:gosec // documentation
		return err
	}
	return os.WriteFile(filepath.Join(o.docs, "dataplane.md"), []byte(b.String()), 0o644) //nolint:gosec // documentation
}
