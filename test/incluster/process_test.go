package incluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// await looks until there is no error.
func (p place) await(what string, f func() error) {
	p.Helper()
	if err := Await(p.Context(), patience, func(context.Context) error { return f() }); err != nil {
		p.Fatalf("%s: %v", what, err)
	}
}

// restarted waits until a pod's sidecar was started anew, once.
func (p place) restarted(pod string) {
	p.Helper()
	p.await("a sidecar of "+pod+" that has started anew", func() error {
		if s := p.pod(pod).Status.InitContainerStatuses[0]; s.RestartCount != 1 || s.State.Running == nil {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
}

// kill ends a process of a pod's sidecar.
func (p place) kill(pod string, find func(pod string) (int, error)) {
	p.Helper()
	pid, err := find(pod)
	if err == nil {
		err = unix.Kill(pid, unix.SIGKILL)
	}
	if err != nil {
		p.Fatal(err)
	}
}

// agent is the process, as this machine sees it, of a pod's agent. There may be other clusters here, so it is looked for in the nodes' cgroups.
func (p place) agent(pod string) (int, error) {
	return find(func(process string) bool {
		command, _ := os.ReadFile(process + "/cmdline") // it may have ended
		if args := strings.Split(string(command), "\x00"); len(args) < 3 || args[1] != "run" || args[2] != "--pod="+p.name+"/"+pod {
			return false
		}
		return slices.ContainsFunc(p.Cluster.Nodes(), func(m *cluster.Machine) bool { return on(m, process) })
	})
}

// envoy is the agent's child.
func (p place) envoy(pod string) (int, error) {
	agent, err := p.agent(pod)
	if err != nil {
		return 0, err
	}
	return find(func(process string) bool {
		status, _ := os.ReadFile(process + "/status")
		return strings.Contains(string(status), fmt.Sprintf("\nPPid:\t%d\n", agent)) && strings.HasPrefix(string(status), "Name:\tenvoy\n")
	})
}

// daemon is the process of a node's daemon.
func daemon(node *cluster.Machine) (int, error) {
	return find(func(process string) bool {
		command, _ := os.ReadFile(process + "/cmdline")
		args := strings.Split(string(command), "\x00")
		return len(args) > 2 && filepath.Base(args[0]) == "mantlet-agent" && args[1] == "node" && on(node, process)
	})
}

// on tells by its cgroup whether a process is on a node.
func on(node *cluster.Machine, process string) bool {
	group, _ := os.ReadFile(process + "/cgroup")
	return strings.Contains(string(group), node.Cgroup()+"/")
}

// enter runs f in a pod's network namespace, in which the pod needs no app for that.
func (p place) enter(pod string, f func() error) {
	p.Helper()
	pid, err := p.agent(pod)
	if err != nil {
		p.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread has entered the pod, and ends with the goroutine
		namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err == nil {
			err = errors.Join(unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET), namespace.Close())
		}
		if err == nil {
			err = f()
		}
		ended <- err
	}()
	if err := <-ended; err != nil {
		p.Fatal(err)
	}
}

// within tries addresses in the place of a pod's app: as root, which no redirect exempts.
func (p place) within(pod string, addresses ...string) (all []traffic.Attempt) {
	p.Helper()
	p.enter(pod, func() error {
		out, err := exec.CommandContext(p.Context(), filepath.Join(p.parts, "traffic"), append([]string{"try"}, addresses...)...).Output()
		for lines := json.NewDecoder(bytes.NewReader(out)); err == nil && len(all) < len(addresses); {
			var a traffic.Attempt
			err = lines.Decode(&a)
			all = append(all, a)
		}
		return err
	})
	return all
}

// serve serves a pod's name at port 8080 in the place of the pod's app, until the test ends.
func (p place) serve(pod string) {
	p.Helper()
	var at net.Listener
	p.enter(pod, func() (err error) {
		at, err = net.Listen("tcp", ":8080")
		return err
	})
	server := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, pod) })}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(at) }()
	p.Cleanup(func() {
		if err := errors.Join(server.Close(), <-ended); !errors.Is(err, http.ErrServerClosed) {
			p.Error(err)
		}
	})
}

// find looks through the directories of all processes.
func find(is func(directory string) bool) (int, error) {
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, directory := range all {
		if is(directory) {
			return strconv.Atoi(filepath.Base(directory))
		}
	}
	return 0, errors.New("no such process")
}
