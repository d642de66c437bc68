package incluster

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// gone is how soon a pod goes that is deleted while its kubelet waits for its sidecar: the minute of agent.Started, and its end.
const gone = 75 * time.Second

// While there is no control plane a pod that starts comes no further than its sidecar, and can be deleted; a sidecar that starts anew keeps its pod closed
// and its app running. When there is a control plane again both are enforced.
func TestStartWithoutControlPlane(t *testing.T) {
	w := extra(t)
	p := newPlace(t, w, "alone")
	api := p.admitting()
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
	p.kubectl("-n", names.SystemNamespace, "wait", "--for=delete", "pod", "-l", "app.kubernetes.io/component=control-plane", "--timeout="+patience.String())

	for _, pod := range []string{"early", "unwanted"} {
		p.kubectl("patch", "pod", pod, "--type=json", "-p", `[{"op": "remove", "path": "/spec/schedulingGates"}]`)
	}
	for _, pod := range []string{"early", "unwanted"} {
		p.await("the agent of "+pod, func() error { _, err := p.agent(pod); return err })
	}
	p.kill("eager", p.agent)
	p.restarted("eager")
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
	api := p.admitting()
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

// admitting makes a server that admits the pod eager, which reaches it, and not the pod stranger. It returns the server's address.
func (p place) admitting() (api string) {
	p.Helper()
	p.apply(server("api", 1), admit("api", "friend"), labelled("eager", "friend", ""), client("stranger", ""))
	p.ready("deployment/api", "pod/eager", "pod/stranger")
	api = p.direct("api")
	p.eventually("admitted", "eager", traffic.Reached, api)
	return api
}
