package netns_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// testContext is for the roles, which have no testing.T.
func testContext() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), time.Minute)
}

func smallNetwork() (*netns.Network, []*netns.Pod, error) {
	n, err := netns.New(netns.Config{})
	if err != nil {
		return nil, nil, err
	}
	var specs []netns.PodSpec
	for i := range 2 {
		specs = append(specs, netns.PodSpec{Namespace: "test", Name: fmt.Sprintf("pod-%d", i), Ports: []netns.Port{{Number: 80, Speaks: netns.ClientFirst}},
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 64, 1, byte(i + 1)}), netip.MustParseAddr(fmt.Sprintf("fd00:10:64::1:%d", i+1))}})
	}
	ctx, cancel := testContext()
	defer cancel()
	pods, err := n.AddPods(ctx, specs)
	return n, pods, err
}

// statusOf runs a program as some user and returns what /proc/self/status said of it.
func statusOf(pod *netns.Pod, user netns.User) (map[string]string, error) {
	ctx, cancel := testContext()
	defer cancel()
	var out, errs bytes.Buffer
	p, err := pod.Start(ctx, netns.Command{Path: "/bin/cat", Args: []string{"/proc/self/status"}, Stdout: &out, Stderr: &errs, User: user})
	if err != nil {
		return nil, err
	}
	if err := p.Wait(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, errs.String())
	}
	status := map[string]string{}
	for line := range strings.Lines(out.String()) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.TrimSpace(value)
	}
	return status, nil
}

func capabilities(pod *netns.Pod, user netns.User) (string, error) {
	status, err := statusOf(pod, user)
	return status["CapPrm"], err
}

// processes lists what /proc shows.
func processes() []int {
	entries, _ := os.ReadDir("/proc")
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// traces are what a sandbox could leave behind, as far as this process can see: processes, namespaces that some process is in, mounts.
type traces struct {
	pids   []int
	spaces map[string]int // "net:[4026531840]" → processes
	mounts string
}

func lookForTraces(t *testing.T) traces {
	t.Helper()
	found := traces{pids: processes(), spaces: map[string]int{}}
	for _, pid := range found.pids {
		for _, kind := range []string{"net", "mnt", "pid", "ipc", "uts", "user"} {
			if space, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns", kind)); err == nil {
				found.spaces[space]++
			}
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	found.mounts = string(mounts)
	return found
}

// since lists the processes that were not there before.
func (now traces) since(before traces) []int {
	return slices.DeleteFunc(slices.Clone(now.pids), func(pid int) bool { return slices.Contains(before.pids, pid) })
}

// awaitEnd waits until a process, known by its pidfd, is dead.
func awaitEnd(pidfd int) {
	for {
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, -1); !errors.Is(err, syscall.EINTR) {
			return
		}
	}
}
