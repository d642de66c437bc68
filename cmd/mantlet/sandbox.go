package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/console"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds"
)

// Exit codes beside 0 and 1 (bad input, or something that could not be done).
const (
	exitMismatch    = 3   // real packets differ from the evaluator
	exitInterrupted = 130 // Ctrl-C
)

// sandboxOptions are the flags of sandbox alone.
type sandboxOptions struct {
	flows, edits   int
	watch, verbose bool
	resumption     string
	streams        []string
}

// check refuses what cannot go together before anything is started.
func (o sandboxOptions) check(in *input, args []string) error {
	if _, err := xds.ParseResumption(o.resumption); err != nil {
		return fmt.Errorf("--%w", err)
	}
	for _, text := range o.streams {
		if _, err := parseRoute(text); err != nil {
			return err
		}
	}
	switch {
	case o.edits < 0:
		return fmt.Errorf("--edits %d: want 0 or more\n  hint: 100 edits make a percentile that means something", o.edits)
	case o.edits > 0 && in.output != "table":
		return fmt.Errorf("--edits reports to people and not as %s\n  hint: leave out -o", in.output)
	case !o.watch && len(o.streams) > 0:
		return errors.New("--stream shows what edits do to open connections, and without --watch there are none\n  hint: add --watch")
	case !o.watch:
		return nil
	case in.output != "table":
		return fmt.Errorf("--watch reports to people and not as %s\n  hint: leave out -o", in.output)
	case slices.Contains(in.files, "-") || slices.Contains(args, "-"):
		return errors.New("standard input cannot be watched\n  hint: name a folder or file with -f")
	}
	return nil
}

func newSandbox() *cobra.Command {
	var in input
	var opts sandboxOptions
	cmd := &cobra.Command{
		Use:   "sandbox -f DIR|FILE…",
		Short: "Run manifests in network namespaces, with real Envoys, and try every connection",
		Long: `Sandbox makes every pod of the manifests a network namespace on this machine, gives every injected pod a real agent and a real
Envoy, and lets every pod try every pod, service and external range on every declared port, with real packets. Every result is
compared with the evaluator's; if one differs the exit code is 3. Nothing is left behind, however it ends.`,
		Example: "  mantlet sandbox -f examples/shop\n  mantlet sandbox -f manifests/ --external 203.0.113.0/24:443 -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			if !netns.Inside() {
				if err := opts.check(&in, args); err != nil {
					return err
				}
				return outside(&in, args, opts)
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
			defer stop()
			err := in.sandbox(ctx, cmd, args, opts)
			if ctx.Err() != nil && (err != nil || !opts.watch) { // Ctrl-C is how a watch ends
				return &exit{exitInterrupted, errors.New("interrupted")}
			}
			return err
		},
	}
	cmd.AddCommand(newExec(), newShell())
	in.register(cmd)
	cmd.Flags().IntVar(&opts.flows, "flows", 1, "how many allowed flows the table shows with the SPIFFE IDs of both ends")
	cmd.Flags().IntVar(&opts.edits, "edits", 0, "then take policies away and put them back, so many times in all, and tell how long each took to be in force")
	cmd.Flags().BoolVarP(&opts.watch, "watch", "w", false, "keep running and apply the edits of the manifests as they happen")
	cmd.Flags().StringVar(&opts.resumption, "resumption", "on", "whether sidecars resume TLS sessions: on or off")
	cmd.Flags().StringArrayVar(&opts.streams, "stream", nil, "with --watch, keep a connection busy: NAMESPACE/POD=NAMESPACE/POD:PORT, and tell for each edit whether it was cut, how fast and why (repeatable)")
	cmd.Flags().BoolVarP(&opts.verbose, "verbose", "v", false, "log what the control plane does, on standard error")
	return cmd
}

// outside checks what can be checked without privileges, so that bad input is refused before anything is started, and then runs the
// same command once more inside its own namespaces.
func outside(in *input, args []string, opts sandboxOptions) error {
	for _, f := range append(slices.Clone(in.files), args...) {
		if f == "-" { // can be read once only: inside
			return reenter(opts)
		}
	}
	w, err := in.read(args, io.Discard)
	if err != nil {
		return err
	}
	if err := checkRoutes(opts.streams, w.manifests); err != nil {
		return err
	}
	return reenter(opts)
}

func reenter(opts sandboxOptions) error {
	if _, err := sandbox.FindBinaries(); err != nil {
		return err
	}
	var files []*os.File
	if opts.watch {
		door, err := console.Listen()
		if err != nil {
			return err
		}
		defer func() { _ = door.Close() }()
		files = append(files, door)
	}
	code, err := netns.Reenter(os.Args, files...)
	if err != nil {
		return err
	}
	if code != 0 {
		return &exit{code, errors.New("")} // said inside
	}
	return nil
}

func (in *input) sandbox(ctx context.Context, cmd *cobra.Command, args []string, opts sandboxOptions) error {
	stderr := cmd.ErrOrStderr()
	w, err := in.read(args, stderr)
	if err != nil {
		return err
	}
	var notices []string
	if w.attempts, notices, err = sandbox.Tried(w.attempts); err != nil {
		return err
	}
	for _, text := range notices {
		fmt.Fprintln(stderr, "notice:", text)
	}
	bins, err := sandbox.FindBinaries()
	if err != nil {
		return err
	}
	sessions, err := xds.ParseResumption(opts.resumption)
	if err != nil {
		return fmt.Errorf("--%w", err)
	}
	level := slog.LevelError
	if opts.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	if os.Getenv("GOGC") == "" {
		// The heap is some 10 MB, which a default collection goes through each few edits: in the middle of one, for as much CPU as that takes itself.
		debug.SetGCPercent(400)
	}
	bar := newProgress(stderr)
	defer bar.clear()
	began := time.Now()
	s, err := sandbox.Start(ctx, sandbox.Config{
		Manifests: w.manifests, Policy: w.config, Options: w.options, Binaries: bins, Progress: bar.show,
		Lifetimes: sandbox.Lifetimes{Resumption: sessions}, Log: log,
	})
	if err != nil {
		return err
	}
	started := time.Since(began)
	res, err := s.Try(ctx, w.attempts)
	tried := time.Since(began) - started
	bar.clear()
	if err == nil {
		err = in.write(cmd.OutOrStdout(), res.Report)
	}
	if err == nil && in.output == "table" {
		showFlows(cmd.OutOrStdout(), res.Flows, opts.flows)
		fmt.Fprintf(cmd.OutOrStdout(), "\npods and sidecars ready after %s; %d connections tried in %s\n",
			started.Round(10*time.Millisecond), len(w.attempts), tried.Round(10*time.Millisecond))
	}
	if err == nil {
		err = w.edits(ctx, cmd.OutOrStdout(), s, opts.edits)
	}
	mismatches := 0
	if err == nil {
		mismatches = res.Report.Summary.Mismatches
		if opts.watch {
			endConsole := serveConsole(ctx, s, log)
			var more int
			more, err = in.watch(ctx, cmd, s, w, opts.streams)
			mismatches += more
			err = errors.Join(err, endConsole())
		}
	}
	if err = errors.Join(err, s.Close()); err != nil {
		return err
	}
	if mismatches > 0 {
		return &exit{exitMismatch, fmt.Errorf("%d connections differ from what the evaluator says: this is a bug in mantlet, please report it with the manifests", mismatches)}
	}
	return nil
}

func showFlows(out io.Writer, flows []sandbox.Flow, most int) {
	if len(flows) == 0 || most <= 0 {
		return
	}
	fmt.Fprintln(out, "\nAllowed, as the sidecar at the destination saw it:")
	for _, f := range flows {
		if f.Reason.Policy == "" { // one that a policy admits says more
			continue
		}
		if most--; most < 0 {
			return
		}
		fmt.Fprintf(out, "  %s → %s\n      from %s as %s\n      to   %s as %s\n      %s\n", f.From, f.To, f.Source, f.FromID, f.Destination, f.ToID, f.Reason.Text)
	}
}

// progress is one line on a terminal that is written over, or nothing.
type progress struct {
	w     io.Writer
	shown bool
}

func newProgress(w io.Writer) *progress {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return &progress{w: w}
	}
	return &progress{}
}

func (p *progress) show(what string, done, of int) {
	if p.w == nil {
		return
	}
	const width = 30
	filled := width
	if of > 0 {
		filled = width * done / of
	}
	p.shown = true
	fmt.Fprintf(p.w, "\r\x1b[K%-12s [%s%s] %d/%d", what, strings.Repeat("=", filled), strings.Repeat(" ", width-filled), done, of)
}

func (p *progress) clear() {
	if p.w != nil && p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.shown = false
	}
}
