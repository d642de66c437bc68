package incluster

import (
	"context"
	"fmt"
	"testing"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// contest is a server, a friend whom it admits, and a foe whom it does not, both of which try without end.
func (p place) contest(replicas int, more string) (friend, foe *flood) {
	p.Helper()
	p.apply(server("api", replicas), admit("api", "friend"), labelled("eager", "friend", more))
	p.ready("deployment/api", "pod/eager")
	to := []string{p.direct("api"), p.service("api")}
	p.eventually("admitted", "eager", traffic.Reached, to...) // the Service's endpoints come a moment after the pods are ready
	friend, foe = p.flood("friend", more, to...), p.flood("foe", more, to...)
	friend.more(settled)
	foe.more(settled)
	return friend, foe
}

// flip writes a policy that admits the foe and not the friend. Once it is in force the friend gets nowhere; that it is told so by connect() itself,
// and that the foe is let through by its own sidecar, is up to what these two sidecars are told then.
func (p place) flip(friend, foe *flood, why string) {
	p.Helper()
	p.apply(admit("api", "foe"))
	p.inForce("api")
	mark := friend.more(settled)
	friend.becomes(why, traffic.Refused)
	foe.becomes(why, traffic.Reached)
	friend.never(why, mark, traffic.Reached)
	friend.since(why, friend.more(0), 20, traffic.Refused)
	foe.since(why, foe.more(0), 20, traffic.Reached)
}

// While no API server runs everything goes on as it was, and what is written when there is one again takes effect.
func TestAPIServerRestart(t *testing.T) {
	w := extra(t)
	p := newPlace(t, w, "restart")
	friend, foe := p.contest(1, "")
	streams, standing := p.streams()
	admitted, denied := friend.more(0), foe.more(0)
	if err := w.Cluster.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	friend.since("no API server", admitted, 100, traffic.Reached)
	foe.since("no API server", denied, 100, traffic.Refused)
	streams.unbroken("no API server", standing, 100)
	if err := w.Cluster.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.flip(friend, foe, "the policy written afterwards")
	streams.unbroken("an API server again, and a policy that concerns others", standing, 50)
	p.apply(client("late", ""))
	p.ready("pod/late")
	p.want("a pod that came afterwards", "late", traffic.Refused, friend.addresses...)
}

// Mantlet is upgraded while connections are made and others last, and while pods are created: none that is allowed fails or breaks, none that is denied
// gets through, no pod is refused, and those that start meanwhile are enforced.
func TestRollingUpgrade(t *testing.T) {
	w := extra(t)
	p := newPlace(t, w, "upgrade")
	if err := w.LoadNext(t.Context()); err != nil {
		t.Fatal(err)
	}
	friend, foe := p.contest(2, "")
	streams, standing := p.streams()
	admitted, denied := friend.more(0), foe.more(0)
	before, err := w.Status(t.Context())
	if err != nil {
		t.Log(err)
	}
	t.Cleanup(func() {
		if err := w.Install(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	stop := p.creating()
	upgrade, ctx := errgroup.WithContext(t.Context())
	upgrade.Go(func() error { return w.Install(ctx, "image="+Next) })
	p.apply(client("meanwhile", ""))
	p.ready("pod/meanwhile")
	if err := upgrade.Wait(); err != nil {
		t.Fatal(err)
	}
	old := map[string]bool{}
	for _, r := range before.Replicas {
		old[r.Name] = true
	}
	if err := Await(t.Context(), patience, func(ctx context.Context) error { return servedByOthers(ctx, p, old) }); err != nil {
		t.Error(err)
	}
	p.await("the end of the old replicas, which outlasts their being replaced by their grace", func() error { return replaced(t.Context(), w, old) })
	stop()
	p.want("a pod that came meanwhile", "meanwhile", traffic.Refused, friend.addresses...)
	friend.since("upgraded", admitted, 50, traffic.Reached)
	foe.since("upgraded", denied, 50, traffic.Refused)
	streams.unbroken("upgraded", standing, 50)
	p.flip(friend, foe, "a policy written afterwards")
}

// replaced is nil when there are no such replicas of the control plane any more.
func replaced(ctx context.Context, w *World, old map[string]bool) error {
	list, err := w.Client.CoreV1().Pods(names.SystemNamespace).List(ctx, metav1.ListOptions{})
	for _, pod := range list.Items {
		if old[pod.Name] {
			return fmt.Errorf("%s is there", pod.Name)
		}
	}
	return err
}

// servedByOthers is nil when all sidecars of a namespace are connected to replicas that are not the old ones.
func servedByOthers(ctx context.Context, p place, old map[string]bool) error {
	s, err := p.Status(ctx)
	if len(s.Sidecars) == 0 {
		return fmt.Errorf("no sidecar is known: %w", err)
	}
	for _, c := range s.In(p.name).Sidecars {
		if !c.Connected || old[c.Replica] {
			return fmt.Errorf("the sidecar of %s: connected: %v, to %q; before there were %v", c.Pod, c.Connected, c.Replica, old)
		}
	}
	return nil
}

// A node is drained within a PodDisruptionBudget: its pods come back on the other one, enforced, and so does the control plane's replica.
func TestDrain(t *testing.T) {
	w := extra(t)
	p := newPlace(t, w, "drain")
	p.apply(`
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: api}
spec: {minAvailable: 1, selector: {matchLabels: {app: api}}}
`)
	friend, foe := p.contest(2, "nodeName: node1, ")
	// Pods of a Deployment are spread over the nodes, so that one is on the node that goes.
	spread := map[string]int{}
	for _, pod := range p.pods("api") {
		spread[pod.Spec.NodeName]++
	}
	if spread["node2"] == 0 {
		t.Fatalf("pods of api by node: %v, want one on node2", spread)
	}
	denied := foe.more(0)
	t.Cleanup(func() {
		if _, err := w.Cluster.Kubectl(context.WithoutCancel(t.Context()), "", "uncordon", "node2"); err != nil {
			t.Error(err)
		}
	})
	p.kubectl("drain", "node2", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=180s")
	p.ready("deployment/api")
	if err := w.AwaitControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, pod := range p.pods("api") {
		if pod.Spec.NodeName != "node1" || len(pod.Spec.InitContainers) != 1 {
			t.Errorf("pod %s is on %s with %d init containers, want node1 and its sidecar", pod.Name, pod.Spec.NodeName, len(pod.Spec.InitContainers))
		}
	}
	p.inForce("api")
	p.apply(labelled("again", "friend", ""), client("stranger", ""))
	p.ready("pod/again", "pod/stranger")
	for _, pod := range p.pods("api") {
		p.eventually("admitted after the drain", "again", traffic.Reached, pod.Status.PodIP+":8080", p.service("api"))
		p.want("denied after the drain", "stranger", traffic.Refused, pod.Status.PodIP+":8080", p.service("api"))
	}
	service := p.service("api")
	friend.addresses, foe.addresses = []string{service}, []string{service} // the pod that they knew may have gone
	friend.since("admitted after the drain", friend.more(settled), 20, traffic.Reached)
	foe.since("denied all the time", denied, 20, traffic.Refused)
}
