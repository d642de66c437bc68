package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Cgroup is the path, in each hierarchy, of a machine's cgroup. No other cluster's is the same, whatever has become of it.
func (m *Machine) Cgroup() string {
	return fmt.Sprintf("/mantlet-%s-%d-%d", m.Name, m.Init.PID, m.Init.Start)
}

// makeCgroups makes a cgroup for the kubelet to put pods in, in each hierarchy. In the cpuset of version 1 it has no CPU and no memory until it is
// told; the root of version 2 has no such files.
func makeCgroups(path string) error {
	hierarchies, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		own := filepath.Join(h, path)
		if err := os.MkdirAll(own, 0o755); err != nil {
			return fmt.Errorf("make cgroup %s: %w", own, err)
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			text, err := os.ReadFile(filepath.Join(h, file))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(own, file), text, 0)
			}
			if err != nil {
				return fmt.Errorf("make cgroup %s: %w", own, err)
			}
		}
	}
	return nil
}

// hierarchies are the mount points of cgroup file systems: the one of version 2, those of version 1, or both, as systemd's hybrid has them.
func hierarchies() ([]string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return nil, err
	}
	var out []string
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && (f[2] == "cgroup" || f[2] == "cgroup2") {
			out = append(out, f[1])
		}
	}
	if len(out) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted\n  hint: mount them on /sys/fs/cgroup")
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// removeCgroups removes a cgroup and those below it. A process that was killed is in its cgroup for a moment more.
func removeCgroups(path string) error {
	hierarchies, err := hierarchies()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, h := range hierarchies {
		if err := await(ctx, nil, func(context.Context) error { return removeTree(filepath.Join(h, path)) }); err != nil {
			return fmt.Errorf("remove cgroup %s: %w", filepath.Join(h, path), err)
		}
	}
	return nil
}

// sweepCgroups removes those of machines that have ended without Down.
func sweepCgroups() error {
	hierarchies, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hierarchies {
		all, err := filepath.Glob(filepath.Join(h, "mantlet-*-*-*"))
		if err != nil {
			return err
		}
		for _, path := range all {
			var first Task
			parts := strings.Split(filepath.Base(path), "-")
			if _, err := fmt.Sscan(strings.Join(parts[len(parts)-2:], " "), &first.PID, &first.Start); err != nil || first.alive() {
				continue // not one of a machine's, or its machine lives
			}
			if err := removeTree(path); err != nil && !errors.Is(err, unix.EBUSY) { // busy: its last process is about to end
				return fmt.Errorf("remove cgroup %s: %w", path, err)
			}
		}
	}
	return nil
}

// removeTree removes directories only: the files in them are the kernel's.
func removeTree(directory string) error {
	entries, err := os.ReadDir(directory)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(directory, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(directory); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}
