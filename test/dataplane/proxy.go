package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// proxy is what stands in the path at one end of a variant.
type proxy struct {
	envoy, agent int    // process ids; 0: there is none
	admin        string // path of Envoy's admin socket
}

// findSidecar finds the agent of a pod, and its Envoy, among the processes of the enclosure.
func findSidecar(pod string) (*proxy, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	args := map[int][]string{}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil {
			args[pid] = strings.Split(string(text), "\x00")
		}
	}
	after := func(list []string, flag string) string {
		if i := slices.Index(list, flag); i >= 0 && i+1 < len(list) {
			return list[i+1]
		}
		return ""
	}
	p := &proxy{}
	dir := ""
	for pid, a := range args {
		if after(a, "--pod") == pod {
			p.agent, dir = pid, after(a, "--run-dir")
		}
	}
	for pid, a := range args {
		if p.agent != 0 && strings.HasPrefix(after(a, "--config-path"), dir+"/") {
			p.envoy = pid
		}
	}
	if p.envoy == 0 {
		return nil, fmt.Errorf("no sidecar of %s runs", pod)
	}
	p.admin = filepath.Join(dir, "envoy", "admin.sock")
	return p, nil
}

// ask asks Envoy's admin interface.
func (p *proxy) ask(ctx context.Context, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", p.admin)
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, 1<<20))
}

// handshakes are those that Envoy's capturing listener has made, and how many of them resumed a session.
func (p *proxy) handshakes(ctx context.Context) (all, resumed int, err error) {
	text, err := p.ask(ctx, `/stats?filter=^listener\..*\.ssl\.(handshake|session_reused)$`)
	if err != nil {
		return 0, 0, err
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ": ")
		n, err := strconv.Atoi(value)
		switch {
		case err != nil:
			return 0, 0, fmt.Errorf("stat %q: %w", lines.Text(), err)
		case strings.HasSuffix(name, "handshake"):
			all += n
		default:
			resumed += n
		}
	}
	return all, resumed, nil
}

// spent is CPU time, user and system, since processes began.
type spent struct{ envoy, agent time.Duration }

func (s spent) minus(o spent) spent { return spent{s.envoy - o.envoy, s.agent - o.agent} }

// spent reads the clocks of an end's processes.
func (p *proxy) spent() (s spent, err error) {
	if s.envoy, err = cpuTime(p.envoy); err != nil {
		return s, err
	}
	if p.agent != 0 {
		s.agent, err = cpuTime(p.agent)
	}
	return s, err
}

// cpuTime reads a process's CPU clock, to the nanosecond: its number is made as clock_getcpuclockid(3) does it.
func cpuTime(pid int) (time.Duration, error) {
	const scheduled = 2 // CPUCLOCK_SCHED of linux/posix-timers.h: user and system time together
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduled), &t); err != nil {
		return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
	}
	return time.Duration(t.Nano()), nil
}

// memory is what a process holds, in bytes: all that is resident, and of that what no file backs and no other process shares.
type memory struct {
	Resident int64 `json:"resident"`
	Private  int64 `json:"private"`
}

func memoryOf(pid int) (m memory, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) != 3 {
			continue
		}
		into := map[string]*int64{"VmRSS:": &m.Resident, "RssAnon:": &m.Private}[fields[0]]
		if into == nil {
			continue
		}
		kb, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return m, fmt.Errorf("%s of process %d: %w", fields[0], pid, err)
		}
		*into = kb << 10
	}
	if m.Resident == 0 {
		return m, fmt.Errorf("process %d tells nothing of its memory", pid)
	}
	return m, nil
}
