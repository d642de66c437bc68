package cluster

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/test/cluster/binaries"
)

const machineVariable = "MANTLET_TEST_MACHINE"

// TestMachineOwner is the process that a machine lives with, in TestMachineEnds.
func TestMachineOwner(t *testing.T) {
	directory := os.Getenv(machineVariable)
	if directory == "" {
		return // not started by that test: nothing is asked of this one
	}
	init, err := binaries.Path(t.Context(), testLog(t), "node")
	if err != nil {
		t.Fatal(err)
	}
	m, err := startMachine(init, "owned", directory, WithProcess)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.start("sleep", filepath.Join(directory, "sleep.log"), "/bin/sleep", "600"); err != nil {
		t.Fatal(errors.Join(err, m.Init.kill()))
	}
	text, err := json.Marshal(m)
	if err != nil {
		t.Fatal(errors.Join(err, m.Init.kill()))
	}
	fmt.Fprintf(os.Stdout, "\n%s\n", text)
	<-t.Context().Done() // it is killed before
}

// A machine that lives with its process ends with it, and all that runs there, even if that process is killed. What runs there sees itself alone,
// under the machine's name.
func TestMachineEnds(t *testing.T) {
	if testing.Short() {
		t.Skip("makes namespaces, as root; left out because of -short")
	}
	t.Parallel()
	directory := t.TempDir()
	owner := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestMachineOwner$")
	owner.Env = append(os.Environ(), machineVariable+"="+directory)
	owner.Stderr = t.Output()
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	var m Machine
	for s := bufio.NewScanner(out); m.Init.PID == 0; {
		if !s.Scan() {
			t.Fatal(errors.Join(errors.New("the owner has ended before there was a machine"), owner.Wait()))
		}
		if strings.HasPrefix(s.Text(), "{") {
			if err := json.Unmarshal(s.Bytes(), &m); err != nil {
				t.Error(err)
				break
			}
		} else if s.Text() != "" {
			t.Log(s.Text())
		}
	}
	seen, err := m.Command("sh", "-c", "hostname; set -- /proc/[0-9]*; echo $#; ls /run; touch /etc/mantlet-test /opt/mantlet-test && echo written").Output()
	if want := "owned\n3\nwritten\n"; err != nil || strings.Join(strings.Fields(string(seen)), "\n")+"\n" != want { // init, sleep, sh; /run is empty
		t.Errorf("seen in the machine: %q %v, want %q", seen, err, want)
	}
	for _, file := range []string{"/etc/mantlet-test", "/opt/mantlet-test"} {
		if exists(file) {
			t.Errorf("%s was written in the machine, and is here", file)
		}
	}
	for name, task := range map[string]Task{"init": m.Init, "sleep": m.Tasks["sleep"]} {
		if !task.alive() {
			t.Errorf("%s has ended before its owner", name)
		}
	}
	if err := owner.Process.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = owner.Wait() // killed
	for name, task := range map[string]Task{"init": m.Init, "sleep": m.Tasks["sleep"]} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if err := await(ctx, nil, func(context.Context) error {
			if task.alive() {
				return errors.New("it runs")
			}
			return nil
		}); err != nil {
			t.Errorf("%s after its owner's end: %v", name, err)
		}
		cancel()
	}
}

// Cgroups of a machine that has ended are swept, those of one that lives are not.
func TestSweep(t *testing.T) {
	if testing.Short() {
		t.Skip("makes cgroups, as root; left out because of -short")
	}
	own, err := taskOf(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	all, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	lives := &Machine{Name: "test", Init: own}
	ended := &Machine{Name: "test", Init: Task{PID: own.PID, Start: own.Start - 1}}
	for _, m := range []*Machine{lives, ended} {
		t.Cleanup(func() {
			if err := removeCgroups(m.Cgroup()); err != nil {
				t.Error(err)
			}
		})
		if err := makeCgroups(m.Cgroup()); err != nil {
			t.Fatal(err)
		}
		for _, h := range all {
			if err := os.MkdirAll(filepath.Join(h, m.Cgroup(), "kubepods", "pod"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := sweepCgroups(); err != nil {
		t.Fatal(err)
	}
	for _, h := range all {
		if !exists(filepath.Join(h, lives.Cgroup())) || exists(filepath.Join(h, ended.Cgroup())) {
			t.Errorf("%s: of a machine that lives: %v, of one that has ended: %v", h, exists(filepath.Join(h, lives.Cgroup())), exists(filepath.Join(h, ended.Cgroup())))
		}
	}
}

// A process is known by its start: another one with the same ID is not ended.
func TestTask(t *testing.T) {
	sleep := exec.CommandContext(t.Context(), "sleep", "600")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	task, err := taskOf(sleep.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	other := task
	other.Start--
	if other.alive() || !task.alive() {
		t.Errorf("alive: %v for another start, %v for its own", other.alive(), task.alive())
	}
	if err := other.kill(); err != nil || !task.alive() {
		t.Errorf("an earlier process of the same ID was ended: %v, and this one lives: %v", err, task.alive())
	}
	if err := task.kill(); err != nil || task.alive() {
		t.Errorf("ended: %v, alive: %v", err, task.alive())
	}
	_ = sleep.Wait()
	if err := task.kill(); err != nil {
		t.Errorf("one that has ended: %v", err)
	}
}
