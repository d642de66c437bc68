package incluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/agent/node"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// While there is no daemon what runs goes on as it was, pods without sidecar start, and a pod with one stays closed, with no app in it. What is written
// meanwhile is in force once there is a daemon again, and not said to be sooner; who waited starts then.
func TestDaemonAway(t *testing.T) {
	w := nodeMode(t)
	p, bare := newPlace(t, w, "away"), newPlace(t, w, "away-bare", "mantlet.dev/inject=disabled")
	bare.apply(server("open", 1))
	bare.ready("deployment/open")
	open := bare.direct("open")
	friend, foe := p.contest(1, "nodeName: node1, ")
	admitted, denied := friend.more(0), foe.more(0)
	t.Cleanup(func() { // other tests need it
		if err := w.Install(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	p.kubectl("-n", names.SystemNamespace, "delete", daemonSet)
	p.await("the daemons' end", func() error {
		if list, err := w.daemons(t.Context()); err != nil || len(list) > 0 {
			return errors.Join(err, fmt.Errorf("%d are left", len(list)))
		}
		return nil
	})

	p.apply(labelled("early", "foe", "nodeName: node1, "), labelled("other", "friend", "nodeName: node2, "), client("unwanted", ""))
	bare.apply(client("without", "nodeName: node1, "))
	bare.ready("pod/without")
	bare.want("a pod without sidecar", "without", traffic.Reached, open)
	for _, pod := range []string{"early", "other"} {
		p.waits(pod)
		p.serve(pod)
		for _, a := range slices.Concat(p.within(pod, open, friend.addresses[0]), bare.try("without", p.pod(pod).Status.PodIP+":8080")) {
			if a.Outcome != traffic.Refused && a.Outcome != traffic.Silent {
				t.Errorf("from or to pod %s, which is closed: %+v", pod, a)
			}
			t.Logf("from or to pod %s, which is closed: %s %s", pod, a.To, a.Outcome)
		}
	}
	p.await("the agent of unwanted", func() error { _, err := p.agent("unwanted"); return err })
	began := time.Now()
	p.kubectl("delete", "pod", "unwanted", "--timeout="+patience.String())
	if took := time.Since(began); took > gone {
		t.Errorf("a pod whose sidecar waits went %s after it was deleted, want %s at most", took, gone)
	} else {
		t.Logf("a pod whose sidecar waits went %s after it was deleted", took)
	}
	friend.since("no daemon", admitted, 100, traffic.Reached)
	foe.since("no daemon", denied, 100, traffic.Refused)
	p.kill("foe", p.agent)
	mark := foe.more(0)
	p.restarted("foe")
	foe.never("its sidecar has started anew, without a daemon", mark, traffic.Reached)

	p.apply(admit("api", "foe"))
	if o, err := w.Mantlet(t.Context(), "status", "--wait", p.name+"/api", "--timeout", "5s"); err == nil || o.Code != 1 {
		t.Errorf("status of a policy that no kernel has: exit code %d, %v\n%s%s", o.Code, err, o.Out, o.Err)
	} else {
		t.Log(strings.TrimSpace(o.Err))
	}
	if err := w.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	p.ready("pod/early", "pod/other")
	p.flip(friend, foe, "the policy written without a daemon")
	p.want("who waited and is admitted", "early", traffic.Reached, friend.addresses...)
	p.want("who waited and is not admitted", "other", traffic.Refused, friend.addresses...)
	for pod, want := range map[string]traffic.Outcome{"early": traffic.Reached, "other": traffic.Refused} { // of what was closed as well
		bare.want("who waited is isolated by no policy", "without", traffic.Reached, p.pod(pod).Status.PodIP+":8080")
		for _, a := range p.within(pod, friend.addresses...) {
			if a.Outcome != want {
				t.Errorf("from pod %s: %+v, want %s", pod, a, want)
			}
		}
	}
}

// Daemons are killed while connections are made and while pods start: no connection that is allowed fails, none that is denied gets through, and who
// starts is closed until it is enforced.
func TestDaemonKilled(t *testing.T) {
	w := nodeMode(t)
	p := newPlace(t, w, "killed")
	friend, foe := p.contest(2, "")
	streams, standing := p.streams()
	admitted, denied := friend.more(0), foe.more(0)
	var pods []string
	for round := range 2 { // the kubelet starts a daemon anew at once the first time, and after 10 s the second
		for i, m := range w.Cluster.Nodes() {
			welcome, stranger := fmt.Sprintf("welcome-%d-%d", round, i), fmt.Sprintf("stranger-%d-%d", round, i)
			p.apply(labelled(welcome, "friend", "nodeName: "+m.Name+", "), client(stranger, "nodeName: "+m.Name+", "))
			p.await("the agent of "+stranger, func() error { _, err := p.agent(stranger); return err })
			p.killDaemon(m)
			pods = append(pods, welcome, stranger)
		}
	}
	for _, pod := range pods {
		p.ready("pod/" + pod)
		if name, _, _ := strings.Cut(pod, "-"); name == "stranger" {
			p.want("denied, from the first attempt on", pod, traffic.Refused, friend.addresses...)
		} else {
			p.eventually("admitted", pod, traffic.Reached, friend.addresses...)
		}
	}
	if err := w.AwaitNodes(t.Context()); err != nil {
		t.Fatal(err)
	}
	friend.since("daemons were killed", admitted, 50, traffic.Reached)
	foe.since("daemons were killed", denied, 50, traffic.Refused)
	streams.unbroken("daemons were killed", standing, 50)
	p.flip(friend, foe, "a policy written afterwards")
}

// Mantlet is upgraded while connections are made and while pods start: control plane, daemons, and the plugin on the nodes.
func TestNodeUpgrade(t *testing.T) {
	w := nodeMode(t)
	p := newPlace(t, w, "next")
	if err := w.LoadNext(t.Context()); err != nil {
		t.Fatal(err)
	}
	friend, foe := p.contest(2, "")
	streams, standing := p.streams()
	admitted, denied := friend.more(0), foe.more(0)
	t.Cleanup(func() {
		if err := w.Install(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	upgrade, ctx := errgroup.WithContext(t.Context())
	upgraded := make(chan struct{})
	upgrade.Go(func() error { defer close(upgraded); return w.Install(ctx, "image="+Next) })
	upgrade.Go(func() error { return p.admittedUntil(ctx, upgraded) })
	var pods []string
	for _, m := range w.Cluster.Nodes() {
		p.await("the end of the daemon of "+m.Name, func() error { return w.upgrading(t.Context(), m.Name) })
		pods = append(pods, "meanwhile-"+m.Name)
		p.apply(client("meanwhile-"+m.Name, "nodeName: "+m.Name+", "))
	}
	if err := upgrade.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, pod := range pods {
		p.ready("pod/" + pod)
		p.want("a pod that came meanwhile", pod, traffic.Refused, friend.addresses...)
	}
	for _, m := range w.Cluster.Nodes() {
		p.await("the next version's plugin on "+m.Name, func() error {
			text, err := os.ReadFile(filepath.Join(m.Root(), cniBinaries, node.PluginName))
			if err == nil && !strings.HasSuffix(string(text), nextMark) {
				err = errors.New("it is another one")
			}
			return err
		})
		name := "afterwards-" + m.Name
		p.apply(client(name, "nodeName: "+m.Name+", "))
		p.ready("pod/" + name)
		p.want("a pod that came afterwards", name, traffic.Refused, friend.addresses...)
		if image := p.pod(name).Spec.InitContainers[0].Image; image != Next {
			t.Errorf("the sidecar of %s is of image %s, want %s", name, image, Next)
		}
	}
	friend.since("upgraded", admitted, 50, traffic.Reached)
	foe.since("upgraded", denied, 50, traffic.Refused)
	streams.unbroken("upgraded", standing, 50)
	p.flip(friend, foe, "a policy written afterwards")
}

// admittedUntil asks for a pod again and again until done is closed, and wants each to be admitted: whom the API server asks may be of two versions. The
// pods are not made.
func (p place) admittedUntil(ctx context.Context, done <-chan struct{}) error {
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for n := 0; ; n++ {
		select {
		case <-done:
			p.Logf("%d pods were admitted meanwhile", n)
			return nil
		case <-again.C:
		}
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "asked-"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name: "app", Image: Client, SecurityContext: &corev1.SecurityContext{RunAsNonRoot: new(true), AllowPrivilegeEscalation: new(false)}}}}} // no warning
		if _, err := p.Client.CoreV1().Pods(p.name).Create(ctx, pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
			return fmt.Errorf("after %d pods that were admitted: %w", n, err)
		}
	}
}

// daemons are the pods of node mode's DaemonSet.
func (w *World) daemons(ctx context.Context) ([]corev1.Pod, error) {
	list, err := w.Client.CoreV1().Pods(names.SystemNamespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=node"})
	return list.Items, err
}

// upgrading is nil once a node's daemon ends for one of Next, or has.
func (w *World) upgrading(ctx context.Context, name string) error {
	list, err := w.daemons(ctx)
	for _, pod := range list {
		if pod.Spec.NodeName == name && (pod.DeletionTimestamp != nil || pod.Spec.Containers[0].Image == Next) {
			return nil
		}
	}
	return errors.Join(err, errors.New("it runs"))
}

// killDaemon ends a node's daemon without notice, as soon as there is one.
func (p place) killDaemon(m *cluster.Machine) {
	p.Helper()
	p.await("a daemon on "+m.Name, func() error {
		pid, err := daemon(m)
		if err == nil {
			err = unix.Kill(pid, unix.SIGKILL)
		}
		return err
	})
}

// waits wants a pod's sidecar to wait for the daemon, and the pod's app not to have started.
func (p place) waits(pod string) {
	p.Helper()
	p.await("word that the sidecar of "+pod+" waits", func() error { return p.said(pod, "Startup probe failed", "the node's daemon") })
	if s := p.pod(pod).Status.ContainerStatuses[0]; s.State.Running != nil || s.RestartCount != 0 || s.LastTerminationState.Terminated != nil {
		p.Errorf("the app of pod %s, which is not enforced: %+v, want it not to have started", pod, s)
	}
}

// said is nil when an event about a pod has all the words.
func (p place) said(pod string, words ...string) error {
	events, err := p.Client.CoreV1().Events(p.name).List(p.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + pod})
	if err != nil {
		return err
	}
	var all []string
	for _, e := range events.Items {
		all = append(all, e.Message)
		missing := 0
		for _, w := range words {
			if !strings.Contains(e.Message, w) {
				missing++
			}
		}
		if missing == 0 {
			return nil
		}
	}
	return fmt.Errorf("no event says %q: %q", words, all)
}
