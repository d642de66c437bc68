package main

import (
	"bufio"
	"fmt"
	"os"
	"runtime/metrics"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// figures are what a process has used so far, and what its server has sent.
type figures struct {
	CPU       time.Duration `json:"cpu"` // user and system
	Allocs    uint64        `json:"allocs"`
	Allocated uint64        `json:"allocated"` // bytes
	Responses uint64        `json:"responses"`
	Answers   uint64        `json:"answers"` // ACK and NACK
	Nacks     uint64        `json:"nacks"`
}

func (p *plane) figures() figures {
	f := processFigures()
	for _, c := range p.Server().Ledger().Totals() {
		f.Responses += c.Responses
		f.Answers += c.Acks + c.Nacks
		f.Nacks += c.Nacks
	}
	return f
}

func processFigures() figures {
	var f figures
	f.CPU = cpu()
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:objects"}, {Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(samples)
	f.Allocs, f.Allocated = samples[0].Value.Uint64(), samples[1].Value.Uint64()
	return f
}

func cpu() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(fmt.Sprintf("CPU time of this process: %v", err))
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func readRSS() (int64, error) {
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }() // was only read
	for s := bufio.NewScanner(f); s.Scan(); {
		if text, ok := strings.CutPrefix(s.Text(), "VmRSS:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(text, "kB")), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("%s has no VmRSS", f.Name())
}

// load is how busy the machine is: processes that run or want to, over the last minute.
func load() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	first, _, _ := strings.Cut(string(b), " ")
	return first
}
