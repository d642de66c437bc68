package incluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// gone is how soon a pod goes that is deleted while its kubelet waits for its sidecar: the minute of agent.Started, and its end.
const gone = 75 * time.Second

// While there is no control plane a pod that starts comes no further than its sidecar, and can be deleted; a sidecar that starts anew keeps its pod closed
// and its app running. When there is a control plane again both are enforced.
func TestStartWithoutControlPlane(t *testing.T) {
	w := extra(t)
	p := newPlace(t, w, "alone")
	p.apply(server("api", 1), admit("api", "friend"), strings.Replace(client("eager", ""), "app: eager", "app: friend", 1), client("stranger", ""))
	p.ready("deployment/api", "pod/eager", "pod/stranger")
	api := p.direct("api")
	p.eventually("admitted", "eager", traffic.Reached, api)
	const gate = "schedulingGates: [{name: test.mantlet.dev/later}], " // no pod comes past the webhook while there is none
	p.apply(client("early", gate), client("unwanted", gate))
	control := func(replicas int) {
		t.Helper()
		p.kubectl("-n", names.SystemNamespace, "scale", "deployment/"+names.Service, fmt.Sprintf("--replicas=%d", replicas))
	}
	t.Cleanup(func() { // other tests need it
		ctx := context.WithoutCancel(t.Context())
		if _, err := w.Cluster.Kubectl(ctx, "", "-n", names.SystemNamespace, "scale", "deployment/"+names.Service, "--replicas=2"); err != nil {
			t.Error(err)
		}
		if err := w.AwaitControlPlane(ctx); err != nil {
			t.Error(err)
		}
	})
	control(0)
	p.kubectl("-n", names.SystemNamespace, "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/name=mantlet", "--timeout="+patience.String())

	for _, pod := range []string{"early", "unwanted"} {
		p.kubectl("patch", "pod", pod, "--type=json", "-p", `[{"op": "remove", "path": "/spec/schedulingGates"}]`)
	}
	for _, pod := range []string{"early", "unwanted"} {
		p.await("the agent of "+pod, func() error { _, err := p.agent(pod); return err })
	}
	p.kill("eager", p.agent)
	p.await("a sidecar that has started anew", func() error {
		if s := p.pod("eager").Status.InitContainerStatuses[0]; s.RestartCount != 1 || s.State.Running == nil {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	for _, a := range p.try("eager", api) {
		if a.Outcome == traffic.Reached {
			t.Errorf("closed until it is enforced again: %+v", a)
		}
	}
	if s := p.pod("eager").Status.ContainerStatuses[0]; s.RestartCount != 0 || s.State.Running == nil {
		t.Errorf("its app: %+v, want it to go on", s)
	}
	began := time.Now()
	p.kubectl("delete", "pod", "unwanted", "--timeout="+patience.String())
	if took := time.Since(began); took > gone {
		t.Errorf("a pod whose sidecar waits went %s after it was deleted, want %s at most", took, gone)
	}
	if s := p.pod("early").Status.ContainerStatuses[0]; s.State.Running != nil || s.RestartCount != 0 || s.LastTerminationState.Terminated != nil {
		t.Errorf("the app of a pod that is not enforced: %+v, want it not to have started", s)
	}

	control(2)
	if err := w.AwaitControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.ready("pod/early")
	p.eventually("admitted again", "eager", traffic.Reached, api)
	for _, pod := range []string{"early", "stranger"} {
		p.want("denied", pod, traffic.Refused, api)
	}
}

// Whichever of its processes is killed, the sidecar comes back, and the app never leaves.
func TestSidecarDies(t *testing.T) {
	w := extra(t)
	p := newPlace(t, w, "dies")
	p.apply(server("api", 1), admit("api", "friend"), strings.Replace(client("eager", ""), "app: eager", "app: friend", 1), client("stranger", ""))
	p.ready("deployment/api", "pod/eager", "pod/stranger")
	api := p.direct("api")
	p.eventually("admitted", "eager", traffic.Reached, api)
	pod := p.pods("api")[0].Name
	for what, find := range map[string]func(string) (int, error){"Envoy": p.envoy, "the agent": p.agent} {
		p.kill(pod, find)
		p.eventually("admitted after "+what+" was killed", "eager", traffic.Reached, api)
		p.want("denied after "+what+" was killed", "stranger", traffic.Refused, api)
	}
	if s := p.pod(pod).Status; s.InitContainerStatuses[0].RestartCount != 1 || s.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("sidecar and app were started anew %d and %d times, want 1 and 0", s.InitContainerStatuses[0].RestartCount, s.ContainerStatuses[0].RestartCount)
	}
}

// await looks until there is no error.
func (p place) await(what string, f func() error) {
	p.Helper()
	if err := Await(p.Context(), patience, func(context.Context) error { return f() }); err != nil {
		p.Fatalf("%s: %v", what, err)
	}
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
		group, _ := os.ReadFile(process + "/cgroup")
		return slices.ContainsFunc(p.Cluster.Nodes(), func(m *cluster.Machine) bool { return strings.Contains(string(group), m.Cgroup()+"/") })
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
