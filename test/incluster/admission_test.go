package incluster

import (
	"strings"
	"testing"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// What would defeat enforcement is refused by the API server itself, with words from which a person knows what to do.
func TestAdmissionRefuses(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "refused")
	for _, c := range []struct {
		name, spec, container string
		want                  []string
	}{
		{"net-admin", "", "securityContext: {capabilities: {add: [NET_ADMIN]}}",
			[]string{"pod refused/net-admin is refused, since Mantlet could not enforce policy in it", "spec.containers[0].securityContext.capabilities.add (container app)",
				"with NET_ADMIN it can take the redirect to its sidecar away", "mantlet.dev/allow: capabilities"}},
		{"net-raw", "", "securityContext: {capabilities: {add: [NET_RAW]}}", []string{"it can send packets past its sidecar"}},
		{"privileged", "", "securityContext: {privileged: true}", []string{"securityContext.privileged (container app)", "remove it"}},
		{"proxy-user", "", "securityContext: {runAsUser: 2012345678}",
			[]string{"user 2012345678 is one of those that sidecars run as (2000000000–2134217727), and the pod's own sidecar's connections are not redirected; use another user"}},
		{"host-pid", "hostPID: true, ", "", []string{"spec.hostPID: the pod sees the sidecar's processes"}},
		{"shared", "shareProcessNamespace: true, ", "", []string{"apps could reach into the sidecar's processes, where its key is"}},
		{"captured-port", "", "ports: [{containerPort: 15006}]", []string{"the sidecar captures connections at TCP port 15006; let the app listen at another one"}},
	} {
		manifest := client(c.name, c.spec)
		if c.container != "" {
			manifest = strings.Replace(manifest, "args: [pause]", "args: [pause], "+c.container, 1)
		}
		p.wantRefused(c.name, manifest, c.want...)
	}
	// A namespace that says so has it its own way.
	allowing := newPlace(t, w, "allowing")
	allowing.kubectl("annotate", "namespace", "allowing", "mantlet.dev/allow=capabilities")
	allowing.apply(strings.Replace(client("net-admin", ""), "args: [pause]", "args: [pause], securityContext: {capabilities: {add: [NET_ADMIN]}}", 1))
	allowing.ready("pod/net-admin")
}

func (p place) wantRefused(what, manifest string, want ...string) {
	p.Helper()
	err := p.tryApply(manifest)
	if err == nil {
		p.Errorf("%s: it was let in, want it refused with %q", what, want)
		return
	}
	for _, text := range want {
		if !strings.Contains(err.Error(), text) {
			p.Errorf("%s: got %v, want %q in it", what, err, text)
		}
	}
	p.Logf("%s: %v", what, err)
}

// A sidecar that captures needs NET_ADMIN. Where Pod Security would refuse that, Mantlet says so, and names the mode that needs nothing: in that the pod
// starts.
func TestAdmissionRefusesWhatPodSecurityWould(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "secured", "mantlet.dev/inject=enabled", "pod-security.kubernetes.io/enforce=baseline")
	if w.Capture == inject.CaptureNode {
		p.apply(client("app", ""))
		p.ready("pod/app")
		if list := p.pod("app").Spec.InitContainers; len(list) != 1 || len(list[0].SecurityContext.Capabilities.Add) > 0 {
			t.Errorf("init containers: %+v, want a sidecar without capabilities", list)
		}
		return
	}
	p.wantRefused("baseline", client("app", ""),
		"namespace secured has Pod Security level baseline, which forbids NET_ADMIN", "install Mantlet with capture=node")
}

// Who opts out has no sidecar, and nobody who knows pods by their sidecars takes it for one.
func TestOptOut(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "opt-out")
	without := strings.Replace(client("without", ""), "labels:", `annotations: {mantlet.dev/inject: "false"}, labels:`, 1)
	p.apply(server("api", 1), admit("api", "with"), without, client("with", ""))
	p.ready("deployment/api", "pod/with", "pod/without")
	if n := len(p.pod("without").Spec.InitContainers); n != 0 {
		t.Errorf("a pod with the annotation mantlet.dev/inject: \"false\" has %d init containers", n)
	}
	p.eventually("admitted", "with", traffic.Reached, p.service("api"))
	// It has no sidecar that could tell it early: the server's is where it ends.
	for _, a := range p.try("without", p.direct("api")) {
		if a.Outcome != traffic.Refused && a.Outcome != traffic.Cut {
			t.Errorf("a pod without sidecar that is not admitted: %+v", a)
		}
	}
}
