package soak

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/sandbox"
)

// figures are what must not grow.
type figures struct {
	goroutines, files, heap int // of this process; heap in KiB
	pods                    map[string]podFigures
}

// podFigures are those of one pod with a sidecar. Memory is in KiB.
type podFigures struct {
	agent, envoy           int // pids
	agentFiles, envoyFiles int
	agentMemory            int
	envoyMemory            int
	rules                  int // nftables rules and chains
	elements               int // of all nftables sets and maps
	tracked                int // conntrack entries; those of ended connections stay for two minutes
	sockets                int // TCP sockets that are not in TIME_WAIT
}

// measure takes the figures while nobody tries anything.
func measure(t *testing.T, s *sandbox.Sandbox, names []string) figures {
	t.Helper()
	runtime.GC()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	f := figures{goroutines: runtime.NumGoroutine(), files: openFiles(t, os.Getpid()), heap: int(mem.HeapAlloc >> 10), pods: map[string]podFigures{}}
	for _, name := range names {
		f.pods[name] = measurePod(t, s, name)
	}
	return f
}

func measurePod(t *testing.T, s *sandbox.Sandbox, name string) podFigures {
	t.Helper()
	sc, err := s.Sidecar(name)
	if err != nil || sc.Agent == 0 || sc.Envoy == 0 {
		t.Fatalf("the sidecar of %s: %+v, %v", name, sc, err)
	}
	f := podFigures{
		agent: sc.Agent, envoy: sc.Envoy,
		agentFiles: openFiles(t, sc.Agent), envoyFiles: openFiles(t, sc.Envoy),
		agentMemory: memory(t, sc.Agent), envoyMemory: memory(t, sc.Envoy),
	}
	p, ok := s.Pod(name)
	if !ok {
		t.Fatalf("no pod %s", name)
	}
	err = p.Do(func() error {
		if f.rules, err = rules(); err != nil {
			return err
		}
		if f.elements, err = elements(); err != nil {
			return err
		}
		for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
			if err != nil {
				return err
			}
			f.tracked += len(flows)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	for _, file := range []string{"tcp", "tcp6"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", sc.Agent, file))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			const state, timeWait = 3, "06"
			if fields := strings.Fields(line); len(fields) > state && fields[0] != "sl" && fields[state] != timeWait {
				f.sockets++
			}
		}
	}
	return f
}

func rules() (n int, err error) {
	conn, err := nftables.New()
	if err != nil {
		return 0, err
	}
	chains, err := conn.ListChains()
	if err != nil {
		return 0, err
	}
	for _, c := range chains {
		rules, err := conn.GetRules(c.Table, c)
		if err != nil {
			return 0, err
		}
		n += 1 + len(rules)
	}
	return n, nil
}

func elements() (n int, err error) {
	conn, err := nftables.New()
	if err != nil {
		return 0, err
	}
	tables, err := conn.ListTables()
	if err != nil {
		return 0, err
	}
	for _, t := range tables {
		sets, err := conn.GetSets(t)
		if err != nil {
			return 0, err
		}
		for _, set := range sets {
			list, err := conn.GetSetElements(set)
			if err != nil {
				return 0, fmt.Errorf("set %s: %w", set.Name, err)
			}
			n += len(list)
		}
	}
	return n, nil
}

func openFiles(t *testing.T, pid int) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// memory is the resident memory of a process that no file backs, in KiB: pages of the binary come and go as the machine likes.
func memory(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "RssAnon:"); ok {
			n, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("process %d has no RssAnon", pid)
	return 0
}

// table puts the figures of two times side by side.
func table(before, after figures) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "\nthe test\tgoroutines %d → %d\tfiles %d → %d\theap %d → %d KiB\n", before.goroutines, after.goroutines, before.files, after.files, before.heap, after.heap)
	fmt.Fprintln(w, "pod\tagent: files\tKiB\tEnvoy: files\tKiB\trules\telements\tsockets\tconntrack")
	names := make([]string, 0, len(before.pods))
	for name := range before.pods {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		x, y := before.pods[name], after.pods[name]
		fmt.Fprintf(w, "%s\t%d → %d\t%d → %d\t%d → %d\t%d → %d\t%d → %d\t%d → %d\t%d → %d\t%d → %d\n", name,
			x.agentFiles, y.agentFiles, x.agentMemory, y.agentMemory, x.envoyFiles, y.envoyFiles, x.envoyMemory, y.envoyMemory,
			x.rules, y.rules, x.elements, y.elements, x.sockets, y.sockets, x.tracked, y.tracked)
	}
	w.Flush()
	return b.String()
}

// What may be more at the end than after the warm-up. Descriptors and goroutines come and go with connections to the control plane that are
// being made anew; memory settles late, and an allocator keeps what it had once. Agents built with the race
// detector grow more, most likely by its shadow memory, and have a bound of their own that is too wide: see docs/plan.md.
const (
	slackGoroutines = 20
	slackFiles      = 8
	slackHeap       = 16 << 10 // KiB
	slackAgent      = 8 << 10
	slackRace       = 64 << 10
	slackEnvoy      = 12 << 10
	slackSockets    = 6
	slackElements   = 40 // destinations that somebody asked about a while ago are kept for five minutes
)

// compare complains of what has grown.
func compare(t *testing.T, before, after figures) {
	t.Helper()
	most := func(what string, was, is, slack int) {
		t.Helper()
		if is > was+slack {
			t.Errorf("%s: %d, and %d at the end: more than %d more", what, was, is, slack)
		}
	}
	slackMemory := slackAgent
	if *build == "-race" {
		slackMemory = slackRace
	}
	most("goroutines of the test", before.goroutines, after.goroutines, slackGoroutines)
	most("open files of the test", before.files, after.files, slackFiles)
	most("heap of the test, KiB", before.heap, after.heap, slackHeap)
	for name, was := range before.pods {
		is := after.pods[name]
		most("open files of the agent of "+name, was.agentFiles, is.agentFiles, slackFiles)
		most("open files of the Envoy of "+name, was.envoyFiles, is.envoyFiles, slackFiles)
		most("memory of the agent of "+name+", KiB", was.agentMemory, is.agentMemory, slackMemory)
		most("memory of the Envoy of "+name+", KiB", was.envoyMemory, is.envoyMemory, slackEnvoy)
		most("sockets of "+name, was.sockets, is.sockets, slackSockets)
		most("elements of nftables sets of "+name, was.elements, is.elements, slackElements)
		if slices.Contains(immortals, name) && (was.agent != is.agent || was.envoy != is.envoy) {
			t.Errorf("nobody killed the sidecar of %s, and its agent was process %d and is %d, its Envoy was %d and is %d", name, was.agent, is.agent, was.envoy, is.envoy)
		}
		if was.rules != is.rules {
			t.Errorf("nftables rules of %s: %d, and %d at the end", name, was.rules, is.rules)
		}
	}
}
