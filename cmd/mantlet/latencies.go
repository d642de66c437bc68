package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"github.com/mantlet/mantlet/sandbox"
)

// latencies is how long changes took to be in force. Those that no sidecar had to be told of do not count.
type latencies struct {
	took   []time.Duration
	pushed int
	bytes  uint64
}

func (l *latencies) add(c *sandbox.Change) {
	if len(c.Sidecars) == 0 {
		return
	}
	l.took = append(l.took, c.InForce)
	l.pushed += len(c.Sidecars)
	l.bytes += c.Bytes
}

// at is the nearest-rank percentile: the least of the times that so many of a hundred did not exceed.
func (l *latencies) at(percent float64) time.Duration {
	sorted := slices.Sorted(slices.Values(l.took))
	return sorted[max(0, int(math.Ceil(percent/100*float64(len(sorted))))-1)]
}

func (l *latencies) report(out io.Writer) {
	n := len(l.took)
	if n < 2 { // one has been told of already
		return
	}
	round := func(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }
	fmt.Fprintf(out, "\n%d edits, each from the control plane's knowing it until the last sidecar had confirmed it: p50 %s, p99 %s, longest %s; "+
		"%.1f sidecars and %d bytes pushed for each\n", n, round(l.at(50)), round(l.at(99)), round(l.at(100)), float64(l.pushed)/float64(n), l.bytes/uint64(n))
}
