package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// report is one run.
type report struct {
	Mode    string
	Tree    string // what was tested, see tree
	Server  string // version of the API server, in its own words
	Began   time.Time
	Took    time.Duration
	Named   []string // that were to run
	Results []result
	Census  counts
}

// sctp is in the names of the tests that need SCTP sockets, in the pods and so in the kernel of this machine.
const sctp = "SCTPConnectivity"

// excuse is why a test may be left out here; empty: it may not.
func excuse(name string) string {
	if !strings.Contains(name, sctp) {
		return ""
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP)
	if err == nil {
		_ = unix.Close(fd)
		return ""
	}
	return "the kernel of this machine has no SCTP sockets: " + err.Error()
}

// excused takes out of names those that cannot run here.
func excused(names []string) (run []string, skipped []result) {
	for _, n := range names {
		if excuse(n) == "" {
			run = append(run, n)
		} else {
			skipped = append(skipped, result{Name: n, State: "skipped"})
		}
	}
	return run, skipped
}

func namesOf(results []result) (out []string) {
	for _, r := range results {
		out = append(out, r.Name)
	}
	return out
}

// section is the report as Markdown.
func (r report) section() string {
	var b strings.Builder
	count := map[string]int{}
	for _, t := range r.Results {
		count[t.State]++
	}
	slices.SortFunc(r.Results, func(a, b result) int { return strings.Compare(a.Name, b.Name) })
	fmt.Fprintf(&b, "## %s\n\nCommit %s; %s; API server %s.\n\n", r.Mode, r.Tree, r.Began.UTC().Format(time.DateOnly), r.Server)
	fmt.Fprintf(&b, "%d tests: %d passed, %d failed, %d skipped; %s; %d pods with a sidecar, %d without.\n\n", len(r.Named),
		count["passed"], len(r.Results)-count["passed"]-count["skipped"], count["skipped"], r.Took.Round(time.Second), r.Census.Sidecars, len(r.Census.Bare))
	fmt.Fprintln(&b, "| test | result | time |\n| --- | --- | --- |")
	for _, t := range r.Results {
		state := t.State
		if state == "skipped" {
			state += ": " + excuse(t.Name)
		}
		fmt.Fprintf(&b, "| %s | %s | %.1f s |\n", strings.TrimPrefix(t.Name, "[sig-network] "), state, t.Took.Seconds())
	}
	return b.String()
}

// part is a part of the upstream suite, and how many tests it has.
type part struct {
	what  string
	named string // is in the names of its tests, and of none of the parts before
	tests int
}

// parts are those of Kubernetes 1.36. A suite that finds fewer proves less than it seems to; one that finds more has grown, and this has to be looked at.
var parts = []part{{"SCTP tests", sctp, 3}, {"API tests", "Netpol API ", 2}, {"traffic tests", "NetworkPolicy between server and client", 45}}

// complete is nil where the names are those of the whole suite, by number.
func complete(names []string) error {
	found, seen := map[string]int{}, map[string]bool{}
	var errs []error
	for _, n := range names {
		i := slices.IndexFunc(parts, func(p part) bool { return strings.Contains(n, p.named) })
		switch {
		case seen[n]:
			errs = append(errs, fmt.Errorf("named twice: %s", n))
		case i < 0:
			errs = append(errs, fmt.Errorf("of no part of the suite: %s", n))
		default:
			found[parts[i].what]++
		}
		seen[n] = true
	}
	for _, p := range parts {
		if found[p.what] != p.tests {
			errs = append(errs, fmt.Errorf("%d %s, and the suite has %d", found[p.what], p.what, p.tests))
		}
	}
	return errors.Join(errs...)
}

// verdict is nil where the suite was whole, every test has passed or is excused, and every pod had a sidecar.
func (r report) verdict() error {
	errs := []error{complete(r.Named)}
	done := map[string]bool{}
	for _, t := range r.Results {
		done[t.Name] = true
		if t.State != "passed" && (t.State != "skipped" || excuse(t.Name) == "") {
			errs = append(errs, fmt.Errorf("%s: %s %s", t.State, t.Name, t.Message))
		}
	}
	for _, n := range r.Named {
		if !done[n] {
			errs = append(errs, fmt.Errorf("did not run: %s", n))
		}
	}
	if r.Census.Sidecars == 0 || len(r.Census.Bare) > 0 {
		errs = append(errs, fmt.Errorf("%d pods of the tests had a sidecar, and these had none: %s", r.Census.Sidecars, strings.Join(r.Census.Bare, ", ")))
	}
	return errors.Join(errs...)
}

// head is how the file begins.
const head = `# Conformance

The Kubernetes project's own NetworkPolicy tests, unmodified, against Mantlet's sidecars on a real cluster with no other policy engine:
written by ` + "`make conformance`" + `. In *capture node* the tests' namespaces are at Pod Security baseline, as the tests make them; in *capture sidecar*, whose
sidecars take NET_ADMIN, the API server runs without that admission plugin.

`

// replaceSection writes a section into a file of these reports, in the place of the one about the same mode.
func replaceSection(path, mode, text string) error {
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	sections := map[string]string{mode: text}
	for _, s := range strings.Split("\n"+string(old), "\n## ")[1:] {
		name, _, _ := strings.Cut(s, "\n")
		if name != mode {
			sections[name] = "## " + strings.TrimRight(s, "\n") + "\n"
		}
	}
	var b bytes.Buffer
	b.WriteString(head)
	names := make([]string, 0, len(sections))
	for n := range sections {
		names = append(names, n)
	}
	slices.Sort(names)
	for i, n := range names {
		if i > 0 {
			b.WriteString("\n")
		}
		b.WriteString(sections[n])
	}
	return os.WriteFile(path, b.Bytes(), 0o644)
}
