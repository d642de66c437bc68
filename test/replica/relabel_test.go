package replica

import (
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// TestRelabelledMeanwhile: a pod is relabelled while there is no control plane. The next one learns from the certificate that it shows what it was, puts that
// on record, and gives it the new identity, at once and not at the next renewal.
func TestRelabelledMeanwhile(t *testing.T) {
	w := newWorld(t)
	plane := w.startControlPlane()
	db, api := w.addPod("db", "10.64.0.11"), w.addPod("api", "10.64.0.12")
	w.startAgents(agentsAt, db, api)
	w.apply(admit("db", "other"))
	w.await("the policy is in force", api, db, netns.Refused)
	plane.stop()
	w.relabel(api, "other")
	plane = w.startControlPlane()
	w.await("a pod that was relabelled meanwhile", api, db, netns.Connected)
	secret, err := w.client.CoreV1().Secrets(names.SystemNamespace).Get(t.Context(), names.RetiredSecret, metav1.GetOptions{})
	w.must(err)
	if record := string(secret.Data[string(api.object.UID)]); !strings.Contains(record, `"pod":"shop/api"`) || !strings.Contains(record, "10.64.0.12") {
		t.Errorf("on record is %q of %d pods", record, len(secret.Data))
	}
	plane.stop()
}
