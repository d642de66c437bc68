package main

import (
	"fmt"
	"runtime"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// compile measures the index alone: from all objects to the verdicts of every subject and their hashes, in a process of its own.
func compile(o options) (s sample, err error) {
	p, err := startPlane(planeConfig{Shape: o.shape, N: o.n, IndexOnly: true, Profile: o.profile})
	if err != nil {
		return s, err
	}
	r := p.hello
	return sample{Workload: "compile", Last: ms(r.Load), ServerCPU: ms(r.LoadCPU), RSS: r.RSS, allocs: r.Figures.Allocs, allocated: r.Figures.Allocated}, p.stop()
}

// runIndex is the process that does so.
func runIndex(c planeConfig) (r reply, err error) {
	objects, err := c.objects()
	if err != nil {
		return r, err
	}
	index := policy.NewIndex(indexConfig())
	runtime.GC() // what making the objects left behind
	p, err := startProfile(c.Profile, "compile")
	if err != nil {
		return r, err
	}
	before := processFigures()
	began := clock()
	if err := index.ApplyAll(objects); err != nil {
		return r, err
	}
	for _, key := range index.SubjectKeys() {
		if index.Hashes(key) == (policy.Hashes{}) {
			return r, fmt.Errorf("subject %s has no verdicts", key)
		}
	}
	r.Load = clock() - began
	after := processFigures()
	r.LoadCPU, r.Figures = after.CPU-before.CPU, figures{Allocs: after.Allocs - before.Allocs, Allocated: after.Allocated - before.Allocated}
	if r.RSS, err = readRSS(); err != nil {
		return r, err
	}
	return r, p.stop()
}
