package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

// counts are what does not depend on how busy the machine is.
type counts struct {
	Affected  int    `json:"affected"`
	Pushed    int    `json:"pushed"`
	Bytes     int64  `json:"bytes"`
	Allocs    uint64 `json:"allocs"`
	Allocated uint64 `json:"allocated_bytes"`
}

const (
	// tolerance is by how much a count may exceed the baseline.
	tolerance = 1.15
	guardSize = 100
	guardRuns = 40
	// What is counted apart from the workload: the runtime counts allocations by whole spans, and pools are emptied whenever it collects. With so many
	// runs their means came out within a fifth of each other.
	allocsSlack, allocatedSlack = 500, 100_000
)

// guarded are the workloads of which the counts come out alike each time. How often somebody tries to connect depends on the machine.
var guarded = []string{"policy-create", "policy-update", "policy-delete", "scale-up", "scale-down", "namespace-relabel", "service-change"}

// guard compares counts with a file, or writes it.
func guard(ctx context.Context, o options, out io.Writer) error {
	is := map[string]counts{}
	for _, shape := range []string{shapeSpread, shapeOne} {
		small := options{n: guardSize, runs: guardRuns, shape: shape, only: guarded}
		err := all(ctx, small, func(s sample) error {
			if s.mean.allocs == 0 { // ran once
				s.mean.allocs, s.mean.allocated = s.allocs, s.allocated
			}
			is[shape+" "+s.Workload] = counts{s.Affected, s.Pushed, s.Bytes, s.mean.allocs, s.mean.allocated}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if o.accept {
		b, err := json.MarshalIndent(is, "", "  ")
		if err != nil {
			return err
		}
		return os.WriteFile(o.guard, append(b, '\n'), 0o644) //nolint:gosec // it is to be read by everybody
	}
	b, err := os.ReadFile(o.guard)
	if err != nil {
		return err
	}
	var want map[string]counts
	if err := json.Unmarshal(b, &want); err != nil {
		return fmt.Errorf("%s: %w", o.guard, err)
	}
	return compare(want, is, out)
}

// compare prints what is, beside what it may be, and fails where something is more, missing, or new.
func compare(want, is map[string]counts, out io.Writer) error {
	var errs []error
	for _, name := range sortedNames(want, is) {
		w, known := want[name]
		c, measured := is[name]
		if !known || !measured {
			errs = append(errs, fmt.Errorf("%s: in the baseline %t, measured %t", name, known, measured))
			continue
		}
		if c.Affected != w.Affected {
			errs = append(errs, fmt.Errorf("%s: %d sidecars affected, %d in the baseline: it is another workload", name, c.Affected, w.Affected))
		}
		for _, f := range []struct {
			what           string
			is, was, slack float64
		}{
			{"pushed", float64(c.Pushed), float64(w.Pushed), 0}, {"bytes", float64(c.Bytes), float64(w.Bytes), 0},
			{"allocs", float64(c.Allocs), float64(w.Allocs), allocsSlack}, {"allocated_bytes", float64(c.Allocated), float64(w.Allocated), allocatedSlack},
		} {
			verdict := ""
			if f.is > f.was*tolerance+f.slack {
				verdict = "  EXCEEDED"
				errs = append(errs, fmt.Errorf("%s: %s %.0f, %.0f in the baseline", name, f.what, f.is, f.was))
			}
			if _, err := fmt.Fprintf(out, "%-32s %-16s %12.0f %12.0f %+6.1f %%%s\n", name, f.what, f.was, f.is, 100*(f.is/max(f.was, 1)-1), verdict); err != nil {
				return err
			}
		}
	}
	if len(errs) > 0 {
		errs = append(errs, errors.New("hint: if that is meant to be, `make bench-baseline` writes the baseline anew; look at the diff"))
	}
	return errors.Join(errs...)
}

func sortedNames(maps ...map[string]counts) []string {
	seen := map[string]bool{}
	for _, m := range maps {
		for name := range m {
			seen[name] = true
		}
	}
	return sortedKeys(seen)
}
