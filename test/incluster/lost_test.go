package incluster

import (
	"context"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// A cluster whose namespaces all ask for sidecars loses all of Mantlet's pods at once, and its DNS: it closes nothing for good. What runs goes on as it was, no
// pod starts without its sidecar, DNS and Mantlet come back without anybody's help but `mantlet install`.
func TestAllLost(t *testing.T) {
	w := extra(t)
	t.Cleanup(func() { // other tests need it as it was
		if err := w.Install(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	if err := w.Install(t.Context(), "injectByDefault=true"); err != nil {
		t.Fatal(err)
	}
	p := newPlace(t, w, "lost")
	friend, foe := p.contest(1, "")
	admitted, denied := friend.more(0), foe.more(0)

	p.kubectl("-n", names.SystemNamespace, "delete", "deployment/"+names.Service, "--wait=false")
	if w.Capture == inject.CaptureNode {
		p.kubectl("-n", names.SystemNamespace, "delete", daemonSet, "--wait=false")
	}
	p.kubectl("-n", names.SystemNamespace, "wait", "--for=delete", "pod", "--all", "--timeout="+patience.String())
	p.kubectl("-n", "kube-system", "delete", "pod", "-l", "k8s-app=kube-dns", "--timeout="+patience.String())
	p.kubectl("-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout="+patience.String())
	if err := p.tryApply(client("early", "")); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
		t.Errorf("a pod is created that nobody could give a sidecar: %v", err)
	}
	friend.since("all of Mantlet is gone", admitted, 50, traffic.Reached)
	foe.since("all of Mantlet is gone", denied, 50, traffic.Refused)

	if err := w.Install(t.Context(), "injectByDefault=true"); err != nil {
		t.Fatal(err)
	}
	p.apply(client("late", ""))
	p.ready("pod/late")
	p.want("who came afterwards and is not admitted", "late", traffic.Refused, friend.addresses...)
	p.flip(friend, foe, "a policy written afterwards")
}
