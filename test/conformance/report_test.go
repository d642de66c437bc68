package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func good() report {
	return report{
		Mode: "strict", Took: time.Minute, Named: []string{"a"},
		Results: []result{{Name: "a", State: "passed"}}, Census: counts{Sidecars: 3},
	}
}

func TestVerdict(t *testing.T) {
	if err := good().verdict(); err != nil {
		t.Error(err)
	}
	for want, spoil := range map[string]func(r *report){
		"failed: a":             func(r *report) { r.Results[0].State = "failed" },
		"timedout: a":           func(r *report) { r.Results[0].State = "timedout" },
		"skipped: a ":           func(r *report) { r.Results[0].State = "skipped" },
		"did not run: c":        func(r *report) { r.Named = append(r.Named, "c") },
		"0 pods":                func(r *report) { r.Census.Sidecars = 0 },
		"had none: netpol/bare": func(r *report) { r.Census.Bare = []string{"netpol/bare"} },
	} {
		r := good()
		spoil(&r)
		if err := r.verdict(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
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
