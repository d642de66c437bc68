package main

import (
	"io"
	"os"
	"strings"
	"testing"
)

func TestCompare(t *testing.T) {
	base := counts{Affected: 10, Pushed: 10, Bytes: 1000, Allocs: 1000, Allocated: 1000}
	with := func(change func(*counts)) map[string]counts {
		c := base
		change(&c)
		return map[string]counts{"spread policy-update": c}
	}
	for name, c := range map[string]struct {
		is   map[string]counts
		fail string // "": it holds
	}{
		"the same":           {with(func(*counts) {}), ""},
		"a little more":      {with(func(c *counts) { c.Bytes, c.Allocs = 1150, 1149 }), ""},
		"less":               {with(func(c *counts) { c.Bytes, c.Pushed = 1, 1 }), ""},
		"more pushed":        {with(func(c *counts) { c.Pushed = 12 }), "pushed 12"},
		"more bytes":         {with(func(c *counts) { c.Bytes = 1151 }), "bytes 1151"},
		"more allocations":   {with(func(c *counts) { c.Allocs = 1700 }), "allocs 1700"},
		"more memory":        {with(func(c *counts) { c.Allocated = 102_000 }), "allocated_bytes 102000"},
		"others affected":    {with(func(c *counts) { c.Affected = 9 }), "another workload"},
		"one is not there":   {map[string]counts{}, "measured false"},
		"one is new":         {map[string]counts{"spread policy-update": base, "spread other": base}, "in the baseline false"},
		"nothing was pushed": {with(func(c *counts) { c.Pushed = 0 }), ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := compare(with(func(*counts) {}), c.is, io.Discard)
			if (err == nil) != (c.fail == "") || err != nil && !strings.Contains(err.Error(), c.fail) {
				t.Errorf("got %v, want %q", err, c.fail)
			}
		})
	}
}

// TestSmall measures every workload of a small cluster: each run holds every sidecar against what it must hold, so that it fails where one holds
// something else.
func TestSmall(t *testing.T) {
	for _, shape := range []string{shapeSpread, shapeOne} {
		t.Run(shape, func(t *testing.T) {
			seen := map[string]sample{}
			err := all(t.Context(), options{n: 40, runs: 2, shape: shape}, func(s sample) error {
				seen[s.Workload] = s
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if len(seen) != len(workloads)+2 {
				t.Errorf("%d workloads were measured, want %d", len(seen), len(workloads)+2)
			}
			for _, name := range []string{"policy-create", "policy-update", "policy-delete", "namespace-relabel", "service-change", "scale-up", "scale-down"} {
				if s := seen[name]; s.Affected != replicas || s.Pushed != replicas {
					t.Errorf("%s: %d affected and %d pushed, want %d", name, s.Affected, s.Pushed, replicas)
				}
			}
			if s := seen["restart"]; s.Pushed != 0 {
				t.Errorf("restart: %d sidecars were sent what they held already", s.Pushed)
			}
		})
	}
}

// TestMain makes the test's binary a control plane where it is started as one.
func TestMain(m *testing.M) { testMain(m) }

func testMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == planeArgument {
		main()
		return
	}
	os.Exit(m.Run())
}
