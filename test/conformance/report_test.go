package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// suiteNames are the names of the upstream suite's tests, as it lists them.
func suiteNames(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "names.txt"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

func good(t *testing.T) report {
	t.Helper()
	r := report{
		Mode: "strict", Tree: "0123456789ab with changes", Server: "v1.36.3", Began: time.Date(2026, 1, 2, 23, 0, 0, 0, time.FixedZone("", -3600*2)), Took: time.Minute,
		Named: suiteNames(t), Census: counts{Sidecars: 3},
	}
	for _, n := range r.Named {
		r.Results = append(r.Results, result{Name: n, State: "passed"})
	}
	return r
}

func TestVerdict(t *testing.T) {
	if err := good(t).verdict(); err != nil {
		t.Error(err)
	}
	less := func(r *report, named string) {
		i := slices.IndexFunc(r.Named, func(n string) bool { return strings.Contains(n, named) })
		r.Named = slices.Delete(r.Named, i, i+1)
		r.Results = slices.Delete(r.Results, i, i+1)
	}
	first := suiteNames(t)[0]
	for want, spoil := range map[string]func(r *report){
		"failed: " + first:                  func(r *report) { r.Results[0].State = "failed" },
		"timedout: " + first:                func(r *report) { r.Results[0].State = "timedout" },
		"skipped: " + first:                 func(r *report) { r.Results[0].State = "skipped" },
		"did not run: " + first:             func(r *report) { r.Results = r.Results[1:] },
		"0 pods":                            func(r *report) { r.Census.Sidecars = 0 },
		"had none: netpol/bare":             func(r *report) { r.Census.Bare = []string{"netpol/bare"} },
		"44 traffic tests, and the suite":   func(r *report) { less(r, "default-deny-all") },
		"1 API tests, and the suite has 2":  func(r *report) { less(r, "endport") },
		"2 SCTP tests, and the suite has 3": func(r *report) { less(r, sctp) },
		"46 traffic tests, and the suite has 45": func(r *report) {
			name := "Netpol NetworkPolicy between server and client should do more"
			r.Named, r.Results = append(r.Named, name), append(r.Results, result{Name: name, State: "passed"})
		},
		"named twice: " + first: func(r *report) { r.Named[1] = first },
		"of no part of the suite: Services": func(r *report) {
			r.Named, r.Results = append(r.Named, "Services work"), append(r.Results, result{Name: "Services work", State: "passed"})
		},
	} {
		r := good(t)
		spoil(&r)
		if err := r.verdict(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// What needs SCTP is not missed where the kernel has none; where it has, skipping it is a failure.
func TestVerdictSCTP(t *testing.T) {
	r := good(t)
	for i := range r.Results {
		if strings.Contains(r.Results[i].Name, sctp) {
			r.Results[i].State = "skipped"
		}
	}
	if err := r.verdict(); (err == nil) != (excuse(sctp) != "") {
		t.Errorf("SCTP tests skipped, with the reason %q: %v", excuse(sctp), err)
	}
}

// A section says what was tested, when, and against which API server.
func TestSection(t *testing.T) {
	want := "## strict\n\nCommit 0123456789ab with changes; 2026-01-03; API server v1.36.3.\n\n50 tests: 50 passed, 0 failed, 0 skipped; 1m0s; 3 pods with a sidecar, 0 without.\n\n| test |"
	if got := good(t).section(); !strings.HasPrefix(got, want) {
		t.Errorf("got\n%.300s\nwant\n%s", got, want)
	}
}

// The sections of other modes stay when one is written anew.
func TestReplaceSection(t *testing.T) {
	path := filepath.Join(t.TempDir(), "out.md")
	write := func(mode, text string) string {
		t.Helper()
		if err := replaceSection(path, mode, "## "+mode+"\n\n"+text+"\n"); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	write("strict", "one")
	write("permissive", "two")
	want := head + "## permissive\n\ntwo\n\n## strict\n\nthree\n"
	if got := write("strict", "three"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got := write("strict", "three"); got != want {
		t.Errorf("written twice:\n%s", got)
	}
}

// Only what needs SCTP may be left out, and only where the kernel has none: then it is in the report, with the reason.
func TestExcused(t *testing.T) {
	name := "Netpol " + sctp + " should"
	run, skipped := excused([]string{"a", name})
	if reason := excuse(name); reason == "" {
		if len(run) != 2 || len(skipped) != 0 {
			t.Errorf("the kernel has SCTP: run %q, skipped %v", run, skipped)
		}
	} else if r := (report{Results: skipped}); len(run) != 1 || len(skipped) != 1 || !strings.Contains(r.section(), "skipped: "+reason) {
		t.Errorf("run %q, skipped %v, in\n%s", run, skipped, r.section())
	}
	if got := excuse("a"); got != "" {
		t.Errorf("an ordinary test may be left out: %s", got)
	}
}
