package main

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/controlplane/inject"
)

// distribution is a list of times, in the order in which they were taken.
type distribution []time.Duration

// at is a quantile: the smallest time that so many are not above.
func (d distribution) at(q float64) time.Duration {
	sorted := slices.Sorted(slices.Values(d))
	return sorted[max(0, min(len(sorted)-1, int(q*float64(len(sorted)))))]
}

func (d distribution) String() string {
	return fmt.Sprintf("median %s, p99 %s, max %s", ms(d.at(.5)), ms(d.at(.99)), ms(d.at(1)))
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", inMS(d)) }

func inMS(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// machine is what the figures were taken on. Loads are the three averages of /proc/loadavg; Nice is what all of the cluster ran with.
type machine struct {
	Kernel, Before, After string
	Nice                  int
}

func thisMachine() machine {
	var u unix.Utsname
	_ = unix.Uname(&u)                               // it cannot fail with a valid pointer
	raw, _ := unix.Getpriority(unix.PRIO_PROCESS, 0) // nor this of the calling process: 20 minus its nice value (getpriority(2))
	return machine{Kernel: unix.ByteSliceToString(u.Release[:]), Before: load(), Nice: 20 - raw}
}

func load() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	return strings.Join(strings.Fields(string(text))[:3], ", ")
}

// aim is below what a figure shall be; zero: there is no aim.
type aim struct {
	below float64
	unit  string
}

func (a aim) text() string {
	if a == (aim{}) {
		return ""
	}
	return fmt.Sprintf("under %g %s", a.below, a.unit)
}

// outcome goes by what was measured, not by what is left of it when it is written with few digits.
func (a aim) outcome(measured float64) string {
	switch {
	case a == (aim{}):
		return ""
	case measured < a.below:
		return "met"
	default:
		return "**missed**"
	}
}

// modes say where the work is done that has to be done in the pods' network namespaces.
var modes = map[inject.Capture]string{
	inject.CaptureSidecar: "each sidecar does all of its pod's work, with NET_ADMIN",
	inject.CaptureNode:    "sidecars have no capability, and a child of the node's daemon does for each pod what needs any",
}

// document is docs/kubernetes-speed.md.
type document struct {
	Options options
	Machine machine
	Starts  starts
	Writes  writes
	Idle    idle
}

func (d document) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, `# What Mantlet costs in a cluster

Written by `+"`make cluster-speed`"+` (test/incluster/cmd/speed): a cluster of two nodes, kube-apiserver and etcd included, on one machine with %d CPUs (%s,
Linux %s). Load averages: %s before, %s after, everything with nice %d: where others used the machine, times are longer for it.

Measured with capture *%s*: %s.

| | measured | aim | |
| --- | --- | --- | --- |
`, runtime.NumCPU(), runtime.GOARCH, d.Machine.Kernel, d.Machine.Before, d.Machine.After, d.Machine.Nice, d.Options.capture, modes[d.Options.capture])
	difference := d.Starts.difference()
	row := func(what string, measured float64, format string, a aim) {
		fmt.Fprintf(&b, "| %s | "+format+" | %s | %s |\n", what, measured, a.text(), a.outcome(measured))
	}
	row("Pod ready with sidecar minus without, median", inMS(difference.at(.5)), "%.1f ms", aim{1000, "ms"})
	row("API write of a NetworkPolicy to the last ACK, median", inMS(d.Writes.ToACK.at(.5)), "%.1f ms", aim{15, "ms"})
	row("the same, p99", inMS(d.Writes.ToACK.at(.99)), "%.1f ms", aim{50, "ms"})
	row("Private memory of an idle agent, median", middle(d.Idle.Agent.Private), "%.1f MB", aim{20, "MB"})
	row("Private memory of an idle Envoy, median", middle(d.Idle.Envoy.Private), "%.1f MB", aim{})
	row("both", middle(d.Idle.Agent.Private)+middle(d.Idle.Envoy.Private), "%.1f MB", aim{40, "MB"})
	row("CPU of an idle agent, mean", mean(d.Idle.Agent.CPU), "%.2f millicores", aim{})
	row("CPU of an idle Envoy, mean", mean(d.Idle.Envoy.CPU), "%.2f millicores", aim{})
	row("both", mean(d.Idle.Agent.CPU)+mean(d.Idle.Envoy.CPU), "%.2f millicores", aim{5, "millicores"})

	fmt.Fprintf(&b, `
## Pods

%d pairs, by turns, one pod at a time, from the call that creates the pod to the event that says it is ready; images are on the nodes. Before each pod of a pair
passes the same time, at random up to %s: the kubelet does much of its work once a second.

| | median | min | max |
| --- | --- | --- | --- |
`, len(difference), phase)
	for _, r := range []struct {
		what string
		d    distribution
	}{{"with sidecar", d.Starts.With}, {"without", d.Starts.Without}, {"difference of each pair", difference}} {
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.what, ms(r.d.at(.5)), ms(r.d.at(0)), ms(r.d.at(1)))
	}

	daemons := ""
	if d.Idle.Child.Count > 0 {
		daemons = fmt.Sprintf(", %s in their children on the nodes", ms(d.Writes.perWrite(child, d.Idle.Child.CPU)))
	}
	fmt.Fprintf(&b, `
## Policies

%d writes, one after the other has come to rest, with %d sidecars connected to two replicas. Each takes one peer of one app's policy in or out, and is for at
least %d sidecars: those of the app's pods, and of those that use them. The end is the time at which a replica had the last of their ACKs.
A write takes %s of CPU in all agents%s and %s in all Envoys together, on %d CPUs; replicas, API server and etcd come on top. The slowest wait for containerd and
kubelet, which collect containers' stats on both nodes at once: here each 10 s, where containerd's default is each second.

| | median | p90 | p99 | max |
| --- | --- | --- | --- | --- |
`, len(d.Writes.ToACK), d.Writes.Sidecars, d.Writes.Affected, ms(d.Writes.perWrite(agent, d.Idle.Agent.CPU)), daemons, ms(d.Writes.perWrite(envoy, d.Idle.Envoy.CPU)),
		runtime.NumCPU())
	for _, r := range []struct {
		what string
		d    distribution
	}{{"to the API server's answer", d.Writes.Written}, {"to the last ACK", d.Writes.ToACK}, {"from the answer to the last ACK", d.Writes.FromAnswer}} {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", r.what, ms(r.d.at(.5)), ms(r.d.at(.9)), ms(r.d.at(.99)), ms(r.d.at(1)))
	}

	fmt.Fprintf(&b, `
## Idle

Nothing happens for %s. Private and shared memory are those of smaps_rollup; pages of the binaries are shared by all that run on a node.

| | processes | private: median, max | shared: median | CPU: mean, max |
| --- | --- | --- | --- | --- |
`, d.Options.idle)
	for _, r := range []struct {
		what string
		u    usage
	}{{"agent", d.Idle.Agent}, {"Envoy", d.Idle.Envoy}, {"replica of the control plane", d.Idle.Replica}, {"daemon of a node", d.Idle.Daemon}, {"child of a daemon, one for each pod", d.Idle.Child}} {
		if r.u.Count == 0 { // of the other mode
			continue
		}
		fmt.Fprintf(&b, "| %s | %d | %s, %.1f MB | %s | %s, %.2f |\n", r.what, r.u.Count, megabytes(r.u.Private), slices.Max(r.u.Private), megabytes(r.u.Shared),
			millicores(r.u.CPU), slices.Max(r.u.CPU))
	}
	return b.String()
}

func megabytes(list []float64) string { return fmt.Sprintf("%.1f MB", middle(list)) }

func millicores(list []float64) string { return fmt.Sprintf("%.2f millicores", mean(list)) }

func middle(list []float64) float64 {
	sorted := slices.Sorted(slices.Values(list))
	return sorted[len(sorted)/2]
}

func mean(list []float64) (sum float64) {
	for _, x := range list {
		sum += x / float64(len(list))
	}
	return sum
}
