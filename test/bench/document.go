package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// document measures both shapes and writes what docs/performance.md shows: the tables, a plot of how soon and one of how much, and profiles.
func document(ctx context.Context, o options, out io.Writer) error {
	if err := os.MkdirAll(o.docs, 0o755); err != nil { //nolint:gosec // documentation
		return err
	}
	var text strings.Builder
	fmt.Fprintf(&text, "Measured with `go run ./test/bench -docs %s`: %d CPUs, shared with the simulated sidecars; medians of %d runs (3 of the long ones).\n", o.docs, runtime.NumCPU(), o.runs)
	for _, shape := range []string{shapeSpread, shapeOne} {
		fmt.Fprintf(&text, "\n### %s, %d sidecars (load %s when it began)\n\n", shape, o.n, load())
		text.WriteString("| workload | affected | pushed | bytes | first ms | p50 | p99 | last | server CPU ms | client CPU ms | RSS MB | allocations | allocated KB |\n| --- |" + strings.Repeat(" ---: |", 12) + "\n")
		var samples []sample
		part := o
		part.shape = shape
		err := all(ctx, part, func(s sample) error {
			samples = append(samples, s)
			fmt.Fprintf(&text, "| %s | %d | %d | %d | %.1f | %.1f | %.1f | %.1f | %.1f | %.1f | %.0f | %d | %d |\n", s.Workload, s.Affected, s.Pushed, s.Bytes, s.First, s.P50, s.P99, s.Last,
				s.ServerCPU, s.ClientCPU, float64(s.RSS)/1e6, s.allocs, s.allocated/1000)
			_, err := fmt.Fprintf(out, "%s %s: last %.1f ms\n", shape, s.Workload, s.Last)
			return err
		})
		if err != nil {
			return err
		}
		var soon, much []bar
		for _, s := range samples {
			if s.Affected == s.Sidecars { // of another scale
				continue
			}
			soon = append(soon, bar{s.Workload, s.Last})
			much = append(much, bar{s.Workload, float64(s.Bytes) / 1000})
		}
		for name, plot := range map[string]string{
			"last-" + shape:  barChart("change to last affected sidecar, ms ("+shape+")", soon),
			"bytes-" + shape: barChart("bytes per change, KB ("+shape+")", much),
		} {
			if err := os.WriteFile(filepath.Join(o.docs, name+".svg"), []byte(plot), 0o644); err != nil { //nolint:gosec // documentation
				return err
			}
		}
	}
	if err := os.WriteFile(filepath.Join(o.docs, "figures.md"), []byte(text.String()), 0o644); err != nil { //nolint:gosec // documentation
		return err
	}
	return keepProfiles(ctx, o)
}

type bar struct {
	name  string
	value float64
}

// barChart draws horizontal bars.
func barChart(title string, bars []bar) string {
	const left, width, height = 150, 400, 22
	most := 0.0
	for _, b := range bars {
		most = max(most, b.value)
	}
	var svg strings.Builder
	fmt.Fprintf(&svg, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", left+width+90, height*(len(bars)+2))
	fmt.Fprintf(&svg, `<rect width="100%%" height="100%%" fill="white"/><text x="8" y="18" font-weight="bold">%s</text>`+"\n", title)
	for i, b := range bars {
		y, w := height*(i+1)+8, 0.0
		if most > 0 {
			w = width * b.value / most
		}
		fmt.Fprintf(&svg, `<text x="%d" y="%d" text-anchor="end">%s</text><rect x="%d" y="%d" width="%.1f" height="%d" fill="#3b7dd8"/><text x="%.1f" y="%d">%.1f</text>`+"\n",
			left-8, y+14, b.name, left, y+2, w, height-6, left+w+6, y+14, b.value)
	}
	svg.WriteString("</svg>\n")
	return svg.String()
}

func sortedKeys(set map[string]bool) []string {
	var out []string
	for k := range set {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}
