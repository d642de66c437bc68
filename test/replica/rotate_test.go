package replica

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"net/netip"
	"os/exec"
	"sync"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// TestRotate: `mantlet ca rotate --wait` has two replicas, and the Envoys of both, go over to another root, and no connection fails meanwhile. A sidecar that
// comes afterwards, or starts anew, is one like the others.
func TestRotate(t *testing.T) {
	w := newWorld(t)
	first, second := w.launch(agentsAt, healthAt), w.launch(secondAt, secondHealthAt)
	w.ready(first)
	w.ready(second)
	db, api, other := w.addPod("db", "10.64.0.11"), w.addPod("api", "10.64.0.12"), w.addPod("other", "10.64.0.13")
	soon := []string{"--renew-after", "3s"}
	w.startAgentsWith(soon, agentsAt, db)
	w.startAgentsWith(soon, secondAt, api, other)
	w.apply(admit("db", "api"))
	w.await("the policy is in force", other, db, netns.Refused)
	w.await("the policy is in force", api, db, netns.Connected)
	before := w.root()

	ctx, stop := context.WithCancel(t.Context())
	var g sync.WaitGroup
	tries := 0
	g.Go(func() {
		for ctx.Err() == nil {
			outcomes, err := api.net.Probe(ctx, []netns.Target{{Addr: netip.AddrPortFrom(db.addr, port), Speaks: netns.ServerFirst}})
			if ctx.Err() != nil {
				return
			}
			if err != nil || outcomes[0].Connect != netns.Connected || outcomes[0].Err != "" {
				t.Errorf("after %d connections one fails: %+v, %v", tries, outcomes, err)
				return
			}
			tries++
		}
	})
	cmd := exec.CommandContext(t.Context(), build(t, "mantlet"), "ca", "rotate", "--wait", "--pause", "1s", "--timeout", "2m", "--kubeconfig", w.server.Kubeconfig(),
		"--server", "http://"+statusOf(first.health), "--server", "http://"+statusOf(second.health))
	out, err := cmd.CombinedOutput()
	stop()
	g.Wait()
	t.Logf("%d connections\n%s", tries, out)
	if err != nil {
		t.Fatal(err)
	}
	if tries == 0 {
		t.Error("no connection was tried")
	}
	if w.root().Equal(before) {
		t.Error("the namespace's trust bundle is the one before")
	}
	w.want("the rotation is complete", api, db, netns.Connected)
	w.want("the rotation is complete", other, db, netns.Refused)
	late := w.addPod("late", "10.64.0.14")
	w.startAgents(secondAt, late)
	w.relabel(late, "api")
	w.await("who comes later", late, db, netns.Connected)
	first.stop()
	second.stop()
}

// root is the only one in the trust bundle of the pods' namespace.
func (w *world) root() *x509.Certificate {
	w.t.Helper()
	m, err := w.client.CoreV1().ConfigMaps("shop").Get(w.t.Context(), names.RootConfigMap, metav1.GetOptions{})
	w.must(err)
	block, rest := pem.Decode([]byte(m.Data[names.RootKey]))
	if block == nil || len(rest) > 0 {
		w.t.Fatalf("not one root: %q", m.Data[names.RootKey])
	}
	c, err := x509.ParseCertificate(block.Bytes)
	w.must(err)
	return c
}
