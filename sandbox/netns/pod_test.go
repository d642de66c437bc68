package netns_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mantlet/mantlet/sandbox/netns"
)

func TestProcessesHaveThePrivilegesAskedFor(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pod := testPods(t, n, 1)[0]
	single := n.Enclosure().SingleUID
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		user    netns.User
		uid     string
		capable bool
	}{{netns.App, "1000", false}, {netns.Root, "0", true}, {netns.User{}, "0", false}, {netns.User{UID: 77, GID: 88}, "77", false}} {
		status, err := statusOf(pod, c.user)
		if err != nil {
			t.Fatal(err)
		}
		if single {
			c.uid = "0"
		}
		if uid, _, _ := strings.Cut(status["Uid"], "\t"); uid != c.uid {
			t.Errorf("%+v: uid %s, want %s", c.user, uid, c.uid)
		}
		if status["NoNewPrivs"] != map[bool]string{true: "0", false: "1"}[c.capable] {
			t.Errorf("%+v: NoNewPrivs %s", c.user, status["NoNewPrivs"])
		}
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
			if none := strings.Trim(status[set], "0") == ""; !c.capable && !none {
				t.Errorf("%+v: %s %s, want none", c.user, set, status[set])
			}
		}
		if c.capable && !strings.Contains(string(own), "CapEff:\t"+status["CapEff"]) {
			t.Errorf("%+v: CapEff %s is not this process's own", c.user, status["CapEff"])
		}
	}
	// The thread that gave its rights up is not used again.
	for range 20 {
		if got, err := capabilities(pod, netns.Root); err != nil || strings.Trim(got, "0") == "" {
			t.Fatalf("root has %s, %v", got, err)
		}
	}
}

func TestStartPassesStreamsAndResult(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pod := testPods(t, n, 1)[0]
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	var out, errs bytes.Buffer
	p, err := pod.Start(t.Context(), netns.Command{Path: "/bin/sh", Name: "called-so", Dir: "/usr", Env: []string{"A=b"},
		Args:  []string{"-c", `cat; echo "$A $0 $PWD" >&2; ls /sys >/dev/null; echo extra >&3; exit 4`},
		Stdin: strings.NewReader("input"), Stdout: &out, Stderr: &errs, ExtraFiles: []*os.File{write}, User: netns.Root})
	if err != nil {
		t.Fatal(err)
	}
	write.Close()
	var exit *exec.ExitError
	if err := p.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 4 {
		t.Errorf("ended with %v", err)
	}
	extra := make([]byte, 10)
	k, _ := read.Read(extra)
	if out.String() != "input" || errs.String() != "b called-so /usr\n" || string(extra[:k]) != "extra\n" {
		t.Errorf("stdout %q, stderr %q, extra file %q", out.String(), errs.String(), extra[:k])
	}
	if _, err := pod.Start(t.Context(), netns.Command{Path: "/nowhere"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a program that is not there: %v", err)
	}
	if _, err := pod.Start(t.Context(), netns.Command{Path: "/bin/true", User: netns.User{UID: 1, Capable: true}}); err == nil {
		t.Error("a capable user who is not root")
	}
}

// TestStartIsInThePodsNamespace runs code and a program there, and looks that this process has stayed where it was.
func TestStartIsInThePodsNamespace(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pods := testPods(t, n, 2)
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	spaces := map[string]bool{before: true}
	for _, pod := range pods {
		var there string
		if err := pod.Do(func() (err error) { there, err = os.Readlink("/proc/thread-self/ns/net"); return err }); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		p, err := pod.Start(t.Context(), netns.Command{Path: "/bin/readlink", Args: []string{"-n", "/proc/self/ns/net"}, Stdout: &out})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Wait(); err != nil || out.String() != there || spaces[there] {
			t.Errorf("%s: code in %s, program in %s, others in %v; %v", pod.Name(), there, out.String(), spaces, err)
		}
		spaces[there] = true
	}
	failure := errors.New("a failure")
	if err := pods[0].Do(func() error { return failure }); !errors.Is(err, failure) {
		t.Errorf("Do returned %v", err)
	}
	var wait sync.WaitGroup
	for range 50 { // whichever thread these are on
		wait.Go(func() {
			if here, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || here != before {
				t.Errorf("a goroutine is in %s: %v", here, err)
			}
		})
	}
	wait.Wait()
	if now, _ := os.Readlink("/proc/self/ns/net"); now != before {
		t.Errorf("the process is in %s, was in %s", now, before)
	}
}

// stubborn is a shell that ignores SIGTERM and has a child in its group and one that has left it. It says when both are there.
const stubborn = `trap "" TERM; sleep 1000 & setsid sh -c 'echo $$; exec sleep 1000' & wait; while :; do sleep 1000; done`

func startStubborn(ctx context.Context, t *testing.T, pod *netns.Pod) *netns.Process {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	p, err := pod.Start(ctx, netns.Command{Path: "/bin/sh", Args: []string{"-c", stubborn}, Stdout: write, Stderr: t.Output(), User: netns.Root})
	write.Close()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := read.Read(make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestEndsOfAProcess(t *testing.T) {
	before := processes()
	n := testNetwork(t, netns.Config{})
	pods := testPods(t, n, 3)
	killed := func(p *netns.Process) {
		t.Helper()
		var exit *exec.ExitError
		if err := p.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("ended with %v, want SIGKILL", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	p := startStubborn(ctx, t, pods[0])
	cancel()
	killed(p)

	p = startStubborn(t.Context(), t, pods[0])
	patience, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := p.Stop(patience); err == nil || patience.Err() == nil {
		t.Errorf("Stop returned %v before its time was over", err)
	}
	killed(p)

	polite, err := pods[0].Start(t.Context(), netns.Command{Path: "/bin/sleep", Args: []string{"1000"}})
	if err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := polite.Stop(t.Context()); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		t.Errorf("stopped with %v, want SIGTERM", err)
	}

	p = startStubborn(t.Context(), t, pods[1])
	if err := pods[1].Close(); err != nil {
		t.Error(err)
	}
	killed(p)
	if err := pods[1].Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	if _, err := pods[1].Start(t.Context(), netns.Command{Path: "/bin/true"}); err == nil {
		t.Error("a program starts in a pod that is closed")
	}
	if o := probe(t, pods[0], netns.Target{Addr: netip.AddrPortFrom(pods[1].Spec().IPs[0], 80), Speaks: netns.ClientFirst})[0]; o.Connect != "no route to host" {
		t.Errorf("to a pod that is closed: %+v", o)
	}

	p = startStubborn(t.Context(), t, pods[2])
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	killed(p)
	for _, pid := range processes() {
		if !slices.Contains(before, pid) {
			awaitReaped([]int{pid}) // dead, and init's to reap; one that lives shows as the test's own timeout
		}
	}
	if links := linkNames(t); !slices.Equal(links, []string{"lo"}) {
		t.Errorf("links %v are left", links)
	}
}

func TestAProbeServerThatDiedIsReported(t *testing.T) {
	n := testNetwork(t, netns.Config{})
	pod := testPods(t, n, 1)[0]
	before := processes()
	for _, pid := range before {
		if cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); strings.HasPrefix(string(cmdline), "mantlet:app\x00test/pod-0") {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := pod.Connections(t.Context()); err == nil || !strings.Contains(err.Error(), "test/pod-0 has ended") {
		t.Errorf("got %v", err)
	}
}

// TestManyConnectionsAtOnce holds 2,000 connections open between two pods, by way of the node, and does so again right away.
func TestManyConnectionsAtOnce(t *testing.T) {
	const many = 2000
	n := testNetwork(t, netns.Config{ProbesInFlight: many, ProbeTimeout: time.Minute})
	pods := testPods(t, n, 2, netns.Port{Number: 8080, Speaks: netns.ClientFirst})
	target := netns.Target{Addr: netip.AddrPortFrom(pods[1].Spec().IPs[0], 8080), Speaks: netns.ClientFirst, Hold: time.Second}
	for range 2 {
		for _, o := range probe(t, pods[0], slices.Repeat([]netns.Target{target}, many)...) {
			if o.Err != "" || o.Reached == "" {
				t.Fatalf("%+v", o)
			}
		}
	}
	c, err := pods[1].Connections(t.Context())
	if err != nil || len(c) != 1 || c[0].Count != 2*many {
		t.Errorf("the server counted %v, %v", c, err)
	}
}

// TestAHundredPods brings a hundred pods up and has each try all, twice over.
func TestAHundredPods(t *testing.T) {
	const many = 100
	n := testNetwork(t, netns.Config{ProbeTimeout: time.Minute})
	start := time.Now()
	pods := testPods(t, n, many, netns.Port{Number: 8080, Speaks: netns.ClientFirst})
	t.Logf("%d pods are up after %s", many, time.Since(start))
	var targets []netns.Target
	for _, p := range pods {
		targets = append(targets, netns.Target{Addr: netip.AddrPortFrom(p.Spec().IPs[0], 8080), Speaks: netns.ClientFirst, Nonce: p.Name()})
	}
	for range 2 {
		start = time.Now()
		next := make(chan *netns.Pod)
		var workers sync.WaitGroup
		for range 4 {
			workers.Go(func() {
				for pod := range next {
					out, err := pod.Probe(t.Context(), targets)
					if err != nil {
						t.Error(err)
					}
					for _, o := range out {
						if o.Err != "" || o.Reached != o.Target.Nonce+":8080" {
							t.Errorf("from %s: %+v", pod.Name(), o)
						}
					}
				}
			})
		}
		for _, p := range pods {
			next <- p
		}
		close(next)
		workers.Wait()
		t.Logf("%d connections after %s", many*len(targets), time.Since(start))
	}
	start = time.Now()
	if err := n.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("closed after %s", time.Since(start))
	for _, pid := range processes() {
		if cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); strings.HasPrefix(string(cmdline), "mantlet:app") {
			t.Errorf("process %d is left", pid)
		}
	}
	if links, err := net.Interfaces(); err != nil || len(links) != 1 {
		t.Errorf("links %v are left: %v", links, err)
	}
}
