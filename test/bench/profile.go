package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/metrics"
	"runtime/pprof"
	"strings"
)

// profile is a CPU profile of this process that is being written. The zero value is none.
type profile struct {
	cpu  *os.File
	base string // path without an ending
}

// startProfile begins a profile in a folder; "": none.
func startProfile(folder, name string) (p profile, err error) {
	if folder == "" {
		return p, nil
	}
	p.base = filepath.Join(folder, name)
	if p.cpu, err = os.Create(p.base + ".cpu"); err != nil {
		return p, err
	}
	return p, pprof.StartCPUProfile(p.cpu)
}

// stop ends it, and writes what is on the heap and what memory is used for beside it.
func (p profile) stop() error {
	if p.cpu == nil {
		return nil
	}
	pprof.StopCPUProfile()
	memory := os.WriteFile(p.base+".memory", []byte(memoryClasses()), 0o644) //nolint:gosec // a profile
	heap, err := os.Create(p.base + ".heap")
	if err != nil {
		return errors.Join(err, memory, p.cpu.Close())
	}
	return errors.Join(pprof.Lookup("heap").WriteTo(heap, 0), heap.Close(), p.cpu.Close(), memory)
}

// memoryClasses is what the runtime says that the process's memory is, in bytes, one class a line.
func memoryClasses() string {
	samples := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/heap/goal:bytes"}, {Name: "/gc/gogc:percent"}, {Name: "/sched/goroutines:goroutines"}}
	for _, d := range metrics.All() {
		if strings.HasPrefix(d.Name, "/memory/classes/") {
			samples = append(samples, metrics.Sample{Name: d.Name})
		}
	}
	metrics.Read(samples)
	var out strings.Builder
	for _, s := range samples {
		fmt.Fprintf(&out, "%12d %s\n", s.Value.Uint64(), s.Name)
	}
	return out.String()
}
