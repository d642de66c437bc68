package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/incluster"
)

// process is one of Mantlet's in the cluster, as this machine sees it.
type process struct {
	pid     int
	program string // its name and, of the agent, its command: "envoy", "mantlet-agent run"
}

// usage is what the processes of one program use.
type usage struct {
	Count   int
	Private []float64 // MB of each: memory that nobody else has
	Shared  []float64 // MB of each: pages that others have too, of the binary for the most part
	CPU     []float64 // millicores of each
}

// idle is what there is in the cluster while nothing happens, by program. In node mode there are daemons, and a child of theirs for each agent.
type idle struct {
	Agent, Envoy, Replica, Daemon, Child usage
}

const (
	agent   = "mantlet-agent run"
	envoy   = "envoy"
	replica = "mantlet control-plane"
	daemon  = "mantlet-agent node"
	child   = "mantlet-agent netns"
)

// watchIdle counts CPU for a while, and reads memory at the end.
func watchIdle(ctx context.Context, w *incluster.World, d time.Duration) (idle, error) {
	all, err := processes(w.Cluster.Nodes())
	if err != nil {
		return idle{}, err
	}
	before := map[int]time.Duration{}
	for _, p := range all {
		if before[p.pid], err = p.running(); err != nil {
			return idle{}, err
		}
	}
	began := time.Now()
	select {
	case <-ctx.Done():
		return idle{}, ctx.Err()
	case <-time.After(d): // what is measured is what happens in this time
	}
	by := map[string]*usage{agent: {}, envoy: {}, replica: {}, daemon: {}, child: {}}
	for _, p := range all {
		now, err := p.running()
		if err != nil {
			return idle{}, err
		}
		u := by[p.program]
		u.CPU = append(u.CPU, 1000*(now-before[p.pid]).Seconds()/time.Since(began).Seconds())
		private, shared, err := p.memory()
		if err != nil {
			return idle{}, err
		}
		u.Count, u.Private, u.Shared = u.Count+1, append(u.Private, private), append(u.Shared, shared)
	}
	out := idle{*by[agent], *by[envoy], *by[replica], *by[daemon], *by[child]}
	return out, out.check(w.Capture, len(w.Cluster.Nodes()))
}

// check is nil where there is all that a mode has, and nothing of the other: else the figures would be of less than what runs.
func (i idle) check(capture inject.Capture, nodes int) error {
	daemons, children := 0, 0
	if capture == inject.CaptureNode {
		daemons, children = nodes, i.Agent.Count
	}
	if i.Agent.Count == 0 || i.Envoy.Count != i.Agent.Count || i.Replica.Count == 0 || i.Daemon.Count != daemons || i.Child.Count != children {
		return fmt.Errorf("%d agents, %d Envoys, %d replicas, %d daemons and %d children of them on %d nodes: not what capture %s has",
			i.Agent.Count, i.Envoy.Count, i.Replica.Count, i.Daemon.Count, i.Child.Count, nodes, capture)
	}
	return nil
}

// processes are Mantlet's on the nodes. A container's process is in its node's cgroup.
func processes(nodes []*cluster.Machine) (all []process, err error) {
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) || err != nil && strings.Contains(err.Error(), "no such process") {
			continue // it has ended
		}
		if err != nil {
			return nil, err
		}
		inside := false
		for _, node := range nodes {
			inside = inside || strings.Contains(string(text), node.Cgroup()+"/")
		}
		if !inside {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return nil, err
		}
		switch program := programOf(pid); program {
		case agent, envoy, replica, daemon, child:
			all = append(all, process{pid, program})
		}
	}
	return all, nil
}

func programOf(pid int) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	args := strings.Split(string(text), "\x00")
	name := filepath.Base(args[0])
	if name == envoy || len(args) < 2 {
		return name
	}
	return name + " " + args[1]
}

// running is how long a process's threads have run so far: the first number of each thread's schedstat, in ns (Documentation/scheduler/sched-stats).
func (p process) running() (sum time.Duration, err error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.pid))
	if err == nil && len(files) == 0 {
		err = fmt.Errorf("process %d (%s) has ended", p.pid, p.program)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // a thread that has ended just now
		}
		var ns int64
		if _, err := fmt.Sscan(string(text), &ns); err != nil {
			return 0, fmt.Errorf("%s: %w", file, err)
		}
		sum += time.Duration(ns)
	}
	return sum, err
}

// running is how long all processes of each program have run so far.
func running(nodes []*cluster.Machine) (map[string]time.Duration, error) {
	all, err := processes(nodes)
	if err != nil {
		return nil, err
	}
	sum := map[string]time.Duration{}
	for _, p := range all {
		d, err := p.running()
		if err != nil {
			return nil, err
		}
		sum[p.program] += d
	}
	return sum, nil
}

// memory is what smaps_rollup says, in MB: Private_* and Shared_*.
func (p process) memory() (private, shared float64, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p.pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		kib, err := strconv.Atoi(f[1])
		if err != nil {
			return 0, 0, err
		}
		switch {
		case strings.HasPrefix(f[0], "Private_") && f[0] != "Private_Hugetlb:":
			private += float64(kib) * 1024 / 1e6
		case strings.HasPrefix(f[0], "Shared_") && f[0] != "Shared_Hugetlb:":
			shared += float64(kib) * 1024 / 1e6
		}
	}
	return private, shared, nil
}
