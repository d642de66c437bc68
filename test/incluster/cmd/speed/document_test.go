package main

import (
	"strings"
	"testing"
	"time"
)

func TestDistribution(t *testing.T) {
	var hundred distribution
	for i := range 100 {
		hundred = append(hundred, time.Duration(100-i)*time.Millisecond) // 1 to 100, the last first
	}
	for _, c := range []struct {
		d    distribution
		q    float64
		want time.Duration
	}{
		{hundred, 0, 1}, {hundred, .5, 51}, {hundred, .9, 91}, {hundred, .99, 100}, {hundred, 1, 100},
		{hundred[:1], 0, 100}, {hundred[:1], .5, 100}, {hundred[:1], 1, 100}, {hundred[:3], .5, 99},
	} {
		if got := c.d.at(c.q); got != c.want*time.Millisecond {
			t.Errorf("quantile %v of %d: got %s, want %d ms", c.q, len(c.d), got, c.want)
		}
	}
}

// Figures stand beside what the issue wants of them.
func TestDocument(t *testing.T) {
	second := time.Second
	one := usage{Count: 1, Private: []float64{12.04}, Shared: []float64{50}, CPU: []float64{1.5}}
	d := document{
		Options: options{idle: time.Minute}, Machine: machine{Kernel: "6.1", Before: "1, 2, 3", After: "4, 5, 6", Nice: 19},
		Starts: starts{With: distribution{3 * second, 2 * second, 2 * second}, Without: distribution{second, second, second / 2}},
		Writes: writes{Written: distribution{second}, ToACK: distribution{2 * second}, FromAnswer: distribution{second}, Sidecars: 50, Affected: 10,
			Took: 10 * second, CPU: map[string]time.Duration{agent: 35 * time.Millisecond, envoy: 55 * time.Millisecond}},
		Idle: idle{one, one, one},
	}
	text := d.text()
	for _, want := range []string{
		"| Pod ready with sidecar minus without, median | 1500.0 ms | under 1000 ms |", // of the differences of pairs: 2, 1, 1.5 s
		"| API write of a NetworkPolicy to the last ACK, median | 2000.0 ms | under 15 ms |",
		"| both | 24.1 MB | under 40 MB |", "| both | 3.00 millicores | under 5 millicores |",
		"Load averages: 1, 2, 3 before, 4, 5, 6 after, everything with nice 19", "Linux 6.1", "50 sidecars", "least 10 sidecars",
		"A write takes 10.0 ms of CPU in all agents and 20.0 ms in all Envoys together", // two writes with the one not counted; 15 ms in 10 s are idle
		"| from the answer to the last ACK | 1000.0 ms |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}
