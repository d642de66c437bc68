package replica

import (
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// status runs `mantlet status` against replicas and returns its exit code and what it writes.
func (w *world) status(servers []*controlPlane, args ...string) (code int, out, errs string) {
	w.t.Helper()
	for _, p := range servers {
		args = append(args, "--server", "http://"+statusOf(p.health))
	}
	cmd := exec.Command(build(w.t, "mantlet"), append([]string{"status", "--kubeconfig", w.server.Kubeconfig()}, args...)...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()
}

// statusOf is where the replica with a health port has its status port.
func statusOf(health string) string { return strings.TrimSuffix(health, "4") + "5" }

// TestStatus: what `mantlet status --wait` says is in force is in force at the very next connection, whichever replica a sidecar is connected
// to; and its exit code tells where it is not, and where it cannot be told.
func TestStatus(t *testing.T) {
	w := newWorld(t)
	first, second := w.launch(agentsAt, healthAt), w.launch(secondAt, secondHealthAt)
	w.ready(first)
	w.ready(second)
	both := []*controlPlane{first, second}
	db, api, other := w.addPod("db", "10.64.0.11"), w.addPod("api", "10.64.0.12"), w.addPod("other", "10.64.0.13")
	w.startAgents(agentsAt, db)
	w.startAgents(secondAt, api, other)
	wait := func(what string, want int, text string, servers []*controlPlane, args ...string) {
		t.Helper()
		code, out, errs := w.status(servers, args...)
		if code != want || !strings.Contains(out+errs, text) {
			t.Errorf("%s: exit code %d, not %d with %q\n%s%s", what, code, want, text, out, errs)
		}
	}
	for range 5 {
		for _, of := range []*sidecarPod{api, other} {
			w.apply(admit("db", of.object.Name))
			wait("a policy that was written just now", 0, "shop/db: 1 of 1 in force", both, "--wait", "shop/db", "--timeout", "30s")
			for _, from := range []*sidecarPod{api, other} {
				want := netns.Refused
				if from == of {
					want = netns.Connected
				}
				w.want("the policy is in force", from, db, want)
			}
		}
	}
	wait("all", 0, "3 sidecars: all in force", both)
	code, out, errs := w.status(both, "-o", "json", "-n", "shop")
	var s status.Status
	if err := json.Unmarshal([]byte(out), &s); err != nil || code != 0 {
		t.Fatalf("json: exit code %d, %v\n%s%s", code, err, out, errs)
	}
	for _, c := range s.Sidecars {
		if c.State != status.InForce || c.LastAck.IsZero() || c.Certificate.IsZero() {
			t.Errorf("sidecar %+v", c)
		}
		want := second
		if c.Pod == "shop/db" {
			want = first
		}
		if c.Replica != "http://"+statusOf(want.health) {
			t.Errorf("%s is connected to %s", c.Pod, c.Replica)
		}
	}

	bare := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "bare", Labels: map[string]string{"app": "db"}},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "app"}}}}
	_, err := w.client.CoreV1().Pods("shop").Create(t.Context(), bare, metav1.CreateOptions{})
	w.must(err)
	wait("a pod without a sidecar", 1, "1 of 2 in force; 1 pod has no sidecar (shop/bare)", both, "--wait", "db", "-n", "shop", "--timeout", "2s")
	wait("a policy that there is not", 2, "not found", both, "--wait", "shop/none")
	wait("no namespace", 2, "hint: namespace/name", both, "--wait", "db")
	wait("an output that there is not", 2, "hint: table, wide or json", both, "-o", "xml")
	wait("no replica in the cluster", 2, "no replica of the control plane is running in namespace mantlet-system", nil)

	w.must(w.client.CoreV1().Pods("shop").Delete(t.Context(), "bare", metav1.DeleteOptions{GracePeriodSeconds: new(int64)}))
	wait("no such pod any more", 0, "1 of 1 in force", both, "--wait", "shop/db", "--timeout", "30s")

	first.stop()
	wait("a replica that does not answer", 2, "not heard", both)
	wait("what it cannot tell", 2, "it is not known whether shop/db is in force", both, "--wait", "shop/db", "--timeout", "1s")
	wait("a sidecar whose replica is gone", 1, "not connected", both[1:])
	second.stop()
	wait("nobody answers", 2, "no sidecar is known", both)
}
