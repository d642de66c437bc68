package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// sweep kills what still runs in the hosts' network namespaces: processes that left the group of the one that started them.
func (n *Network) sweep(hosts []*host) error {
	spaces := make(map[uint64]bool, len(hosts))
	for _, h := range hosts {
		inode, err := h.inode()
		if err != nil {
			return err
		}
		spaces[inode] = true
	}
	// A process that is being killed cannot start another one, so this ends; the bound is against what was not thought of.
	const rounds = 100
	for range rounds {
		left, err := processesIn(spaces)
		if err != nil || len(left) == 0 {
			return err
		}
		for _, pid := range left {
			end(pid)
		}
	}
	return errors.New("processes in the sandbox's pods cannot be killed; the kernel ends them with the sandbox")
}

// processesIn lists the processes, this one aside, whose network namespace is among those. Zombies have none.
func processesIn(spaces map[uint64]bool) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		var stat unix.Stat_t
		if unix.Stat(filepath.Join("/proc", e.Name(), "ns/net"), &stat) == nil && spaces[stat.Ino] {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// end kills a process and waits until it is dead.
func end(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil { // gone, or a kernel without pidfds: then the next round looks again
		_ = syscall.Kill(pid, syscall.SIGKILL)
		return
	}
	defer func() { _ = unix.Close(fd) }()
	_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	wait := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(wait, -1); !errors.Is(err, syscall.EINTR) {
			return
		}
	}
}
