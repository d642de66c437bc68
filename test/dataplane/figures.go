package main

import (
	"fmt"
	"math"
	"slices"
)

// metrics are what a round has figures of, as they are shown.
var metrics = []struct{ name, title, unit string }{
	{"rate", "connections", "/s"},
	{"connect-p50", "connect p50", "µs"},
	{"connect-p99", "connect p99", "µs"},
	{"request-p50", "request p50", "µs"},
	{"request-p99", "request p99", "µs"},
	{"bulk-1", "bulk, 1 stream", "MB/s"},
	{"bulk-8", "bulk, 8 streams", "MB/s"},
	{"cpu", "CPU per connection", "µs"},
	{"envoy-cpu", "of that Envoys", "µs"},
	{"agent-cpu", "of that agents", "µs"},
	{"bulk-1-cpu", "CPU per GB", "ms"},
}

// figures are what a measurement says.
type figures struct {
	CPUs       int              `json:"cpus"`
	Rounds     int              `json:"rounds"`
	LoadBefore string           `json:"load_before"` // /proc/loadavg: runnable on average over 1, 5 and 15 minutes
	LoadAfter  string           `json:"load_after"`
	Variants   []variantFigures `json:"variants"`
	Ratios     []ratio          `json:"ratios"`
	Targets    []target         `json:"targets"`
}

// variantFigures are medians over the rounds, and what was read at the end. Times are microseconds, bulk is 10^6 bytes a second, CPU per GB is
// milliseconds.
type variantFigures struct {
	Name     string             `json:"name"`
	Admitted int                `json:"admitted"`
	Median   map[string]float64 `json:"median"`
	resting
}

// ratio is one variant's figure over another's, of the same round; the median over the rounds, and the least and the greatest.
type ratio struct {
	Metric string  `json:"metric"`
	Of     string  `json:"of"`
	To     string  `json:"to"`
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
}

// target is a ratio that is to be reached.
type target struct {
	ratio
	AtLeast float64 `json:"at_least,omitempty"` // one of both
	AtMost  float64 `json:"at_most,omitempty"`
	Met     bool    `json:"met"`
}

// targets are what the project has set itself. Per connection is CPU time: what others do on the machine hits that least.
var targets = []target{
	{ratio: ratio{Metric: "cpu", Of: "strict-10000", To: strictOne}, AtMost: 1.10},
	{ratio: ratio{Metric: "connect-p50", Of: "strict-10000", To: strictOne}, AtMost: 1.10},
	{ratio: ratio{Metric: "rate", Of: strictOne, To: plainPair}, AtLeast: 0.45},
	{ratio: ratio{Metric: "rate", Of: linearOne, To: plainPair}, AtLeast: 0.45},
	{ratio: ratio{Metric: "rate", Of: classicOne, To: plainPair}, AtLeast: 0.45},
	{ratio: ratio{Metric: "bulk-1", Of: strictOne, To: plainPair}, AtLeast: 0.9},
	{ratio: ratio{Metric: "bulk-8", Of: strictOne, To: plainPair}, AtLeast: 0.9},
}

// conclude makes figures of a measurement.
func conclude(chosen []variant, m *measurement) figures {
	f := figures{Rounds: len(m.rounds[0])}
	for i, v := range chosen {
		vf := variantFigures{Name: v.name, Admitted: v.admitted, Median: map[string]float64{}, resting: m.rest[i]}
		for _, metric := range metrics {
			var all []float64
			for _, r := range m.rounds[i] {
				if x := r[metric.name]; x > 0 {
					all = append(all, x)
				}
			}
			if len(all) > 0 { // else it was not asked for, or nobody stands between the apps
				vf.Median[metric.name] = median(all)
			}
		}
		f.Variants = append(f.Variants, vf)
	}
	for _, base := range []string{rawTCP, plainPair, linearOne, strictOne} {
		for _, v := range chosen {
			for _, metric := range metrics {
				if r, ok := compare(chosen, m, metric.name, v.name, base); ok {
					f.Ratios = append(f.Ratios, r)
				}
			}
		}
	}
	for _, t := range targets {
		r, ok := compare(chosen, m, t.Metric, t.Of, t.To)
		if !ok {
			continue
		}
		t.ratio = r
		t.Met = (t.AtLeast == 0 || r.Median >= t.AtLeast) && (t.AtMost == 0 || r.Median <= t.AtMost)
		f.Targets = append(f.Targets, t)
	}
	return f
}

// compare has no answer where a variant was not measured, is the same, or has no such figure: nothing stands between apps that speak directly.
func compare(chosen []variant, m *measurement, metric, of, to string) (ratio, bool) {
	at := func(name string) int { return slices.IndexFunc(chosen, func(v variant) bool { return v.name == name }) }
	i, j := at(of), at(to)
	if i < 0 || j < 0 || i == j {
		return ratio{}, false
	}
	var all []float64
	for n := range m.rounds[i] {
		a, b := m.rounds[i][n][metric], m.rounds[j][n][metric]
		if a <= 0 || b <= 0 {
			return ratio{}, false
		}
		all = append(all, a/b)
	}
	return ratio{Metric: metric, Of: of, To: to, Median: median(all), Low: slices.Min(all), High: slices.Max(all)}, true
}

// median is the middle one, or the mean of both that are in the middle.
func median(all []float64) float64 {
	if len(all) == 0 {
		return math.NaN()
	}
	s := slices.Sorted(slices.Values(all))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// find looks a ratio up.
func (f *figures) find(metric, of, to string) (ratio, bool) {
	i := slices.IndexFunc(f.Ratios, func(r ratio) bool { return r.Metric == metric && r.Of == of && r.To == to })
	if i < 0 {
		return ratio{}, false
	}
	return f.Ratios[i], true
}

// String is for example "0.47 (0.41–0.52)".
func (r ratio) String() string { return fmt.Sprintf("%.2f (%.2f–%.2f)", r.Median, r.Low, r.High) }

// bound is for example "≥ 0.45".
func (t target) bound() string {
	if t.AtLeast > 0 {
		return fmt.Sprintf("≥ %.2f", t.AtLeast)
	}
	return fmt.Sprintf("≤ %.2f", t.AtMost)
}

func (t target) verdict() string {
	if t.Met {
		return "met"
	}
	return "missed"
}
