package incluster

import (
	"context"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// Mantlet is taken out of the cluster as `mantlet uninstall --help` says: nothing of it is left, and pods start as they did before it. Installed again it
// enforces again.
func TestUninstall(t *testing.T) {
	w := extra(t)
	p := newPlace(t, w, "uninstall")
	p.admitting()
	p.withoutSidecars()
	t.Cleanup(func() { // other tests need it
		if err := w.Install(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	if w.Capture == inject.CaptureNode {
		if err := w.Install(t.Context(), "node.plugin=removed"); err != nil {
			t.Fatal(err)
		}
	}
	list, err := w.Mantlet(t.Context(), "uninstall")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Cluster.Kubectl(t.Context(), list.Out, "delete", "--ignore-not-found", "--timeout="+patience.String(), "-f", "-"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Cluster.Kubectl(t.Context(), "", "delete", "configmaps", "--all-namespaces", "--field-selector", "metadata.name="+names.RootConfigMap); err != nil {
		t.Fatal(err)
	}
	for what, args := range map[string][]string{
		"of what uninstall names": {"get", "--ignore-not-found", "-o", "name", "-f", "-"},
		"of what is Mantlet's": {"get", "-A", "-o", "name", "-l", "app.kubernetes.io/part-of=mantlet",
			"namespaces,all,mutatingwebhookconfigurations,validatingwebhookconfigurations,validatingadmissionpolicies,validatingadmissionpolicybindings,clusterroles,clusterrolebindings,networkpolicies"},
		"of the trust bundle": {"get", "configmaps", "-A", "-o", "name", "--field-selector", "metadata.name=" + names.RootConfigMap},
	} {
		stdin := ""
		if args[len(args)-1] == "-" {
			stdin = list.Out
		}
		if left, err := w.Cluster.Kubectl(t.Context(), stdin, args...); err != nil || strings.TrimSpace(left) != "" {
			t.Errorf("left %s: %q, %v, want nothing", what, left, err)
		}
	}
	for _, m := range w.Cluster.Nodes() {
		if w.Capture == inject.CaptureNode {
			w.wantBare(t, m)
		}
		if pid, err := daemon(m); err == nil {
			t.Errorf("process %d of %s is a daemon's", pid, m.Name)
		}
	}

	p.kubectl("label", "namespace", p.name, "mantlet.dev/inject=enabled")
	p.apply(client("plain", ""))
	p.ready("pod/plain")
	if n := len(p.pod("plain").Spec.InitContainers); n != 0 {
		t.Errorf("a pod that came without Mantlet has %d init containers", n)
	}
	p.eventually("without Mantlet", "plain", traffic.Reached, p.direct("api"), p.service("api"))

	if err := w.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.kubectl("rollout", "restart", "deployment/api")
	p.apply(client("stranger", ""), labelled("eager", "friend", ""))
	p.ready("deployment/api", "pod/eager", "pod/stranger")
	p.inForce("api")
	api := p.pods("api")[0].Status.PodIP + ":8080"
	p.want("installed again, not admitted", "stranger", traffic.Refused, api, p.service("api"))
	p.eventually("installed again, admitted", "eager", traffic.Reached, api, p.service("api"))
}
