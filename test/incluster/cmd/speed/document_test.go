package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mantlet/mantlet/controlplane/inject"
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

func measured(capture inject.Capture) document {
	second := time.Second
	one := usage{Count: 1, Private: []float64{12.04}, Shared: []float64{50}, CPU: []float64{1.5}}
	d := document{
		Options: options{idle: time.Minute, capture: capture}, Machine: machine{Kernel: "6.1", Before: "1, 2, 3", After: "4, 5, 6", Nice: 19},
		Starts: starts{With: distribution{3 * second, 2 * second, 2 * second}, Without: distribution{second, second, second / 2}},
		Writes: writes{Written: distribution{second}, ToACK: distribution{2 * second}, FromAnswer: distribution{second}, Sidecars: 50, Affected: 10,
			Took: 10 * second, CPU: map[string]time.Duration{agent: 35 * time.Millisecond, envoy: 55 * time.Millisecond}},
		Idle: idle{Agent: one, Envoy: one, Replica: one},
	}
	if capture == inject.CaptureNode {
		d.Idle.Daemon, d.Idle.Child = one, one
		d.Writes.CPU[child] = 25 * time.Millisecond
	}
	return d
}

// Figures stand beside what is wanted of them, whether that is met, and which mode was measured.
func TestDocument(t *testing.T) {
	both := []string{
		"| Pod ready with sidecar minus without, median | 1500.0 ms | under 1000 ms | **missed** |", // of the differences of pairs: 2, 1, 1.5 s
		"| API write of a NetworkPolicy to the last ACK, median | 2000.0 ms | under 15 ms | **missed** |",
		"| the same, p99 | 2000.0 ms | under 50 ms | **missed** |",
		"| Private memory of an idle agent, median | 12.0 MB | under 20 MB | met |", "| Private memory of an idle Envoy, median | 12.0 MB |  |  |",
		"| both | 24.1 MB | under 40 MB | met |", "| both | 3.00 millicores | under 5 millicores | met |",
		"Load averages: 1, 2, 3 before, 4, 5, 6 after, everything with nice 19", "Linux 6.1", "50 sidecars", "least 10 sidecars",
		"| from the answer to the last ACK | 1000.0 ms |",
	}
	daemonRow, childRow := "| daemon of a node | 1 |", "| child of a daemon, one for each pod | 1 |"
	for capture, c := range map[inject.Capture]struct{ with, without []string }{
		inject.CaptureSidecar: {
			with: []string{"Measured with capture *sidecar*: each sidecar does all",
				"A write takes 10.0 ms of CPU in all agents and 20.0 ms in all Envoys together"}, // two writes with the one not counted; 15 ms in 10 s are idle
			without: []string{daemonRow, childRow},
		},
		inject.CaptureNode: {
			with: []string{"Measured with capture *node*: sidecars have no capability", daemonRow, childRow,
				"A write takes 10.0 ms of CPU in all agents, 5.0 ms in their children on the nodes and 20.0 ms in all Envoys together"},
		},
	} {
		text := measured(capture).text()
		for _, want := range slices.Concat(both, c.with) {
			if !strings.Contains(text, want) {
				t.Errorf("%s: no %q in\n%s", capture, want, text)
			}
		}
		for _, not := range c.without {
			if strings.Contains(text, not) {
				t.Errorf("%s: %q in\n%s", capture, not, text)
			}
		}
	}
}

// What is written as the aim itself has missed it or met it by what was measured.
func TestOutcome(t *testing.T) {
	a := aim{15, "ms"}
	for measured, want := range map[float64]string{14.99: "met", 15: "**missed**", 15.01: "**missed**"} {
		if got := a.outcome(measured); got != want {
			t.Errorf("%v: got %s, want %s", measured, got, want)
		}
	}
}

func TestIdleCheck(t *testing.T) {
	of := func(agents, envoys, replicas, daemons, children int) idle {
		return idle{Agent: usage{Count: agents}, Envoy: usage{Count: envoys}, Replica: usage{Count: replicas}, Daemon: usage{Count: daemons}, Child: usage{Count: children}}
	}
	for _, c := range []struct {
		capture inject.Capture
		is      idle
		good    bool
	}{
		{inject.CaptureSidecar, of(50, 50, 2, 0, 0), true}, {inject.CaptureNode, of(50, 50, 2, 2, 50), true},
		{inject.CaptureSidecar, of(50, 50, 2, 2, 50), false}, {inject.CaptureNode, of(50, 50, 2, 0, 0), false}, {inject.CaptureNode, of(50, 50, 2, 2, 49), false},
		{inject.CaptureNode, of(50, 50, 2, 1, 50), false}, {inject.CaptureSidecar, of(0, 0, 2, 0, 0), false}, {inject.CaptureSidecar, of(50, 49, 2, 0, 0), false},
		{inject.CaptureSidecar, of(50, 50, 0, 0, 0), false},
	} {
		if err := c.is.check(c.capture, 2); (err == nil) != c.good {
			t.Errorf("%s, %+v: %v", c.capture, c.is, err)
		}
	}
}

func TestCapture(t *testing.T) {
	for name, good := range map[string]bool{"sidecar": true, "node": true, "": false, "Node": false} {
		var o options
		if err := o.setCapture(name); (err == nil) != good || good != (o.capture == inject.Capture(name) && name != "") {
			t.Errorf("%q: %v, %q", name, err, o.capture)
		}
	}
}
