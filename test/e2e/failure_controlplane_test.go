package e2e

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/server"
)

// TestControlPlaneDies kills the control plane under running sidecars. What they know they enforce, what they do not know is closed; when
// another one comes nothing is sent that they have, what was edited meanwhile is in force, and pods that were started meanwhile, which
// were closed until then, become ready.
func TestControlPlaneDies(t *testing.T) {
	m := manifests(t, besieged)
	s := start(t, m, matrix.Options{})
	db, api, evil := pod(t, s, "shop/db"), pod(t, s, "shop/api"), pod(t, s, "shop/evil")
	plain := pod(t, s, "legacy/plain")
	enforced := func() {
		t.Helper()
		for i, a := range db.Spec().IPs {
			for _, port := range []uint16{banner, echo} {
				wantReached(t, probe(t, api, a, port), "shop/db")
				wantNothing(t, probe(t, evil, a, port))
			}
			wantReached(t, probe(t, plain, a, echo), "shop/db")
			thief := meshTLS(genuine(t, s.Authority(), identityOf(t, s, "shop/evil")))
			unseen(t, s, a, echo, func() {
				if n := steal(t, evil, netip.AddrPortFrom(a, echo), thief, "hello\n"); n != 0 {
					t.Errorf("%s: a denied peer got %d bytes", a, n)
				}
			})
			wantReached(t, probe(t, db, evil.Spec().IPs[i], echo), "shop/evil")
		}
	}
	enforced()

	s.StopControlPlane()
	enforced()
	unknown := api.Spec().IPs
	for _, a := range unknown { // evil may go to api, and has not asked yet
		wantNothing(t, probe(t, evil, a, echo))
	}

	// Nothing changed while it was away: nothing is sent but what was asked for and not answered.
	restart(t, s)
	for url, n := range s.ControlPlane().Server().Ledger().Totals() {
		switch {
		case n.Removals > 0 || url != server.ClusterType && n.Resources > 0:
			t.Errorf("%s: %+v was sent to sidecars that have it all", url, n)
		case n.Resources > uint64(len(unknown)):
			t.Errorf("%s: %d resources were sent, and only %d are new", url, n.Resources, len(unknown))
		}
	}
	// What could not be asked about was refused, and is asked about again now, at the first attempt: the agent forgets that before it talks to the control
	// plane that is back.
	for _, a := range unknown {
		wantReached(t, probe(t, evil, a, echo), "shop/api")
	}
	enforced()
	reaches := func(from *netns.Pod, a netip.Addr, who string) {
		t.Helper()
		await(t, from.Name()+" reaches "+who, func() bool { return strings.HasPrefix(probe(t, from, a, echo).Reached, who+":") })
	}

	// Policy is edited, and a pod is made, while it is away again.
	s.StopControlPlane()
	next := reread(t, besieged+`
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: api-in, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}, policyTypes: [Ingress], ingress: [{from: [{podSelector: {matchLabels: {app: late}}}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: late, namespace: shop, labels: {app: late}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 8080}]}]}
`, m)
	if _, err := s.Update(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	late := pod(t, s, "shop/late")
	await(t, "the redirect of the late pod", func() bool { return s.AgentLog("shop/late") != "" })
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := s.AwaitReady(short, "shop/late"); err == nil {
		t.Error("the late pod is ready without any policy")
	}
	for i, a := range api.Spec().IPs {
		wantNothing(t, probe(t, late, a, echo))
		wantNothing(t, probe(t, api, late.Spec().IPs[i], echo))
		wantNothing(t, probe(t, plain, late.Spec().IPs[i], echo))
		if n := accepted(t, late, echo); n != 0 {
			t.Errorf("the app of the late pod has accepted %d connections", n)
		}
		wantReached(t, probe(t, evil, a, echo), "shop/api") // as before the edit
	}
	restart(t, s)
	if err := s.AwaitReady(t.Context(), "shop/late"); err != nil {
		t.Fatal(err)
	}
	for i, a := range api.Spec().IPs {
		reaches(late, a, "shop/api")
		reaches(api, late.Spec().IPs[i], "shop/late")
		wantNothing(t, probe(t, evil, a, echo))
	}
	enforced()
}

// TestControlPlaneIsSlow: with a control plane that takes its time, everything is the same and later; and with one that hangs, what is
// known stays in force.
func TestControlPlaneIsSlow(t *testing.T) {
	m := manifests(t, besieged)
	s := start(t, m, matrix.Options{})
	db, api, evil := pod(t, s, "shop/db"), pod(t, s, "shop/api"), pod(t, s, "shop/evil")
	s.SlowControlPlane(200 * time.Millisecond)
	for _, a := range db.Spec().IPs { // the first time, so the sidecar asks
		wantReached(t, probe(t, api, a, echo), "shop/db")
		wantNothing(t, probe(t, evil, a, echo))
	}
	opened := *m
	opened.Objects.NetworkPolicies = nil
	if _, err := s.Update(t.Context(), &opened); err != nil {
		t.Fatal(err)
	}
	for _, a := range db.Spec().IPs {
		wantReached(t, probe(t, evil, a, echo), "shop/db")
	}
	if _, err := s.Update(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	s.SlowControlPlane(0)

	thaw := s.FreezeControlPlane()
	defer thaw()
	for i, a := range db.Spec().IPs {
		wantReached(t, probe(t, api, a, echo), "shop/db")
		wantNothing(t, probe(t, evil, a, echo))
		wantNothing(t, probe(t, db, evil.Spec().IPs[i], echo)) // not asked for before
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := s.Update(ctx, &opened); err == nil {
		t.Error("an edit is in force while the control plane hangs")
	}
	thaw()
	confirmed(t, s, "shop/db", "shop/evil", "shop/api")
	for i, a := range db.Spec().IPs {
		wantReached(t, probe(t, evil, a, echo), "shop/db")
		wantReached(t, probe(t, db, evil.Spec().IPs[i], echo), "shop/evil")
	}
}

// restart starts a control plane and returns when every sidecar that is there has connected to it and confirmed everything.
func restart(t *testing.T, s *sandbox.Sandbox) {
	t.Helper()
	if err := s.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range s.ControlPlane().Server().Ledger().Snapshot() {
		confirmed(t, s, string(c.Client))
	}
}

// reread reads manifests from text, with the addresses of those before.
func reread(t *testing.T, text string, previous *source.Manifests) *source.Manifests {
	t.Helper()
	file := filepath.Join(t.TempDir(), "manifests.yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	m, err := source.ReadManifests([]string{file}, source.Options{Previous: previous})
	if err != nil {
		t.Fatal(err)
	}
	return m
}
