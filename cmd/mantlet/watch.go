package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/spf13/cobra"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
)

// watch applies the edits of the manifests to the running sandbox until it is interrupted, and says for each what changed in
// connectivity and how long it took. It returns how many connections differed from what the evaluator says.
func (in *input) watch(ctx context.Context, cmd *cobra.Command, s *sandbox.Sandbox, w *world, routes []string) (mismatches int, err error) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return 0, fmt.Errorf("watch the manifests: %w", err)
	}
	defer func() { _ = watcher.Close() }() // it was only read
	if err := watchAll(watcher, in.files); err != nil {
		return 0, err
	}
	out, stderr := cmd.OutOrStdout(), cmd.ErrOrStderr()
	var took latencies
	defer func() { took.report(out) }()
	open, err := newStreams(s, out, routes)
	if err != nil {
		return 0, err
	}
	open.begin(ctx)
	defer func() { mismatches += open.end(ctx) }()
	fmt.Fprintln(stderr, "watching for edits; Ctrl-C ends it; `mantlet sandbox shell POD` enters a pod")
	for {
		switch err := edited(ctx, watcher); {
		case ctx.Err() != nil:
			return mismatches, nil
		case err != nil:
			return mismatches, err
		}
		written := settled(ctx, watcher)
		if err := watchAll(watcher, in.files); err != nil { // folders may be new
			fmt.Fprintln(stderr, "error:", err)
		}
		next, err := in.reread(w)
		if err != nil { // an editor may be half-way through: what is in force stays
			fmt.Fprintf(stderr, "error: %v\n%s\n", err, stays)
			continue
		}
		change, err := s.Update(ctx, next.manifests)
		if errors.Is(err, sandbox.ErrOtherNetworks) {
			fmt.Fprintf(stderr, "error: %v\n%s\n", err, stays)
			continue
		}
		if err != nil {
			return mismatches, err
		}
		if len(change.Objects) == 0 {
			continue
		}
		took.add(change)
		n, err := in.report(ctx, out, s, w, next, change, written, open)
		if err != nil {
			return mismatches, err
		}
		mismatches += n
		w = next
	}
}

// stays is said of an edit that cannot be applied.
const stays = "what was in force stays in force"

// edited waits until something has been written. Where the kernel has dropped events it does not know what, which does not matter: all files are read again.
func edited(ctx context.Context, w *fsnotify.Watcher) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-w.Errors:
		if errors.Is(err, fsnotify.ErrEventOverflow) {
			return nil
		}
		return fmt.Errorf("watch the manifests: %w", err)
	case <-w.Events:
		return nil
	}
}

// quiet is how long files have to stay as they are before they are read: many programs empty a file before they write it, and a
// policy that is gone for a moment is a policy that is gone.
const quiet = 25 * time.Millisecond

// settled waits until nothing has been written for a while and returns when the last write was seen.
func settled(ctx context.Context, w *fsnotify.Watcher) time.Time {
	last := time.Now()
	timer := time.NewTimer(quiet)
	defer timer.Stop()
	for {
		select {
		case <-w.Events:
			last = time.Now()
			timer.Reset(quiet)
		case <-timer.C:
			return last
		case <-ctx.Done():
			return last
		}
	}
}

// watchAll watches files and all folders below folders. Files are watched by their folder: editors replace them.
func watchAll(w *fsnotify.Watcher, paths []string) error {
	for _, p := range paths {
		err := filepath.WalkDir(p, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if !d.IsDir() {
				if path != p {
					return nil
				}
				path = filepath.Dir(path)
			}
			return w.Add(path)
		})
		if err != nil {
			return fmt.Errorf("watch %s: %w", p, err)
		}
	}
	return nil
}

// reread reads the manifests again, with the addresses of before.
func (in *input) reread(w *world) (*world, error) {
	m, err := source.ReadManifests(in.files, source.Options{Replicas: in.replicas, Inject: in.scope(), Namespace: in.namespace, Previous: w.manifests})
	if err != nil {
		return nil, err
	}
	next := &world{manifests: m, config: w.config, options: w.options, index: policy.NewIndex(w.config)}
	if err := next.index.ApplyAll(&m.Objects); err != nil {
		return nil, err
	}
	all, err := matrix.Plan(m, w.options)
	if err != nil {
		return nil, err
	}
	next.attempts, _, err = sandbox.Tried(all) // what is not tried was said at the start
	return next, err
}

// report tells what an edit changed: for streams, by the evaluator, and then by packets.
func (in *input) report(ctx context.Context, out io.Writer, s *sandbox.Sandbox, old, next *world, c *sandbox.Change, written time.Time, open *streams) (mismatches int, err error) {
	fmt.Fprintf(out, "\n%s  %s\n", written.Format(time.TimeOnly), strings.Join(c.Objects, ", "))
	if len(c.Sidecars) == 0 {
		fmt.Fprintln(out, "  no running sidecar had to be told")
	} else {
		fmt.Fprintf(out, "  in force after %s (%s after it was written) in %d sidecars, %d bytes of %s: %s\n", c.InForce.Round(10*time.Microsecond),
			c.Began.Add(c.InForce).Sub(written).Round(time.Millisecond), len(c.Sidecars), c.Bytes, strings.Join(c.Types, ", "), strings.Join(c.Sidecars, ", "))
	}
	mismatches = open.report(ctx, c)
	was := verdicts(matrix.Simulate(old.index, old.attempts))
	res, err := s.Try(ctx, next.attempts)
	if err != nil {
		return 0, err
	}
	seen := map[string]bool{}
	for i := range res.Report.Connections {
		conn := &res.Report.Connections[i]
		if conn.Mismatch != "" {
			fmt.Fprintf(out, "  MISMATCH %s (%s): %s\n", conn, conn.Address, conn.Mismatch)
		}
		before, existed := was[connectionKey(conn)]
		line := fmt.Sprintf("%s\n      %s", conn, conn.Reason.Text)
		if existed && before == conn.Verdict || seen[line] {
			continue
		}
		seen[line] = true
		fmt.Fprintf(out, "  now %s: %s\n", conn.Verdict, line)
	}
	sum := res.Report.Summary
	fmt.Fprintf(out, "  %d connections tried: %d allowed (%d authenticated), %d denied, %d differ from the evaluator\n",
		sum.Connections, sum.Allowed, sum.Authenticated, sum.Denied, sum.Mismatches)
	return mismatches + sum.Mismatches, nil
}

func verdicts(r *matrix.Report) map[string]string {
	out := make(map[string]string, len(r.Connections))
	for i := range r.Connections {
		out[connectionKey(&r.Connections[i])] = r.Connections[i].Verdict
	}
	return out
}

func connectionKey(c *matrix.Connection) string {
	return fmt.Sprintf("%s %s %s %s %d/%s", c.From, c.Via, c.To, c.Address, c.Port, c.Protocol)
}
