package agent

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
	"github.com/mantlet/mantlet/xds/server"
)

// One pod of a node, from before its first process to its end.
func TestNodeMode(t *testing.T) {
	w := newNodeWorld(t)
	w.app("[::]:8080")
	echo(t, w.outside.Listen(t, "[::]:9090"))
	echo(t, w.outside.Listen(t, "[::]:9091"))

	out, err := w.cni("ADD")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, `"address": "10.99.0.2/24"`) {
		t.Errorf("the result of the plugins before is not passed on: %s", out)
	}
	w.refused("after the plugin, without a daemon")
	if leaves(t, "10.99.0.1:53") {
		t.Error("UDP leaves a pod that was closed")
	}
	podtest.As(int(w.user.UID), int(w.user.GID), func() { // nobody can tell yet whom the sidecar runs as
		if leaves(t, "10.99.0.1:53") {
			t.Error("UDP of the user that will be the sidecar's leaves a pod that was closed")
		}
		w.refused("after the plugin, as who will be the sidecar's user")
	})

	w.startAgent()
	w.startPlane()
	// Right after its end the reason is that it has gone, and then that the next one is waited for.
	if err := Ready(t.Context(), w.cfg.RunDir, 0); err == nil || !strings.Contains(err.Error(), "the node's daemon") {
		t.Errorf("ready without a daemon: %v", err)
	}
	w.refused("with an agent, without a daemon")

	began := time.Now()
	w.startDaemon()
	w.ready()
	t.Logf("ready %s after the daemon was started", time.Since(began).Round(time.Millisecond))
	w.enforced("with a daemon")
	if got := exempted(t); got != w.user {
		t.Errorf("%s is exempt, and the sidecar is %s", got, w.user)
	}
	onlyExempt(t, "with a daemon", "10.99.0.1:9091", w.user)
	podtest.As(int(w.user.UID), int(w.user.GID), func() { // for its names
		if !leaves(t, "10.99.0.1:53") {
			t.Error("the sidecar's own UDP does not leave")
		}
	})
	r := w.record("the refused connection", func(r flows.Record) bool { return r.Log == names.LogHold && r.Destination.Port() == 9091 })
	if r.Verdict != flows.Denied || r.Direction != flows.Outbound {
		t.Errorf("record: %+v", r)
	}

	t.Run("a daemon that dies and comes back", func(t *testing.T) { w.restartDaemon(t) })
	t.Run("an agent that dies and comes back", func(t *testing.T) { w.restartAgent(t) })
	t.Run("an agent that comes back as somebody else", func(t *testing.T) { w.changeUser(t) })
	t.Run("an app that is in the way", func(t *testing.T) { // of the socket it has no way to; of the ports the daemon's child has
		podtest.AsUser(1234, func() {
			if l, err := net.Listen("tcp", "127.0.0.1:15001"); err == nil {
				l.Close()
				t.Error("an app can take the capture port")
			}
		})
	})

	if _, err := w.cni("CHECK"); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if _, err := w.cni("DEL"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "no child after DEL", func() bool { return len(w.children()) == 0 })
	if list, err := os.ReadDir(w.file("state")); err != nil || len(list) > 0 {
		t.Errorf("after DEL there is state: %v, %v", list, err)
	}
	if _, err := w.cni("DEL"); err != nil {
		t.Errorf("DEL again: %v", err)
	}
}

// enforced wants the world's policy in force.
func (w *nodeWorld) enforced(when string) {
	w.t.Helper()
	t := w.t
	c, err := dial(t, "10.99.0.1:9090")
	if err != nil {
		t.Fatalf("%s: to an admitted address: %v", when, err)
	}
	if got := greeted(t, c); got != "hello\n" {
		t.Errorf("%s: from an admitted address: %q", when, got)
	}
	for _, address := range []string{"10.99.0.1:9091", "10.98.0.1:80", "[fd98::1]:80"} { // outside, and two that are asked about
		if _, err := dial(t, address); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: to %s: %v, not refused", when, address, err)
		}
	}
	p, err := w.peer("10.99.0.2:8080")
	if err != nil {
		t.Fatalf("%s: an admitted peer: %v", when, err)
	}
	if got := greeted(t, p); got != "hello\n" {
		t.Errorf("%s: an admitted peer got %q", when, got)
	}
	p.Close()
	if q, err := w.peer("10.99.0.2:8081"); err == nil {
		if got := greeted(t, q); got != "" {
			t.Errorf("%s: a denied peer got %q", when, got)
		}
	}
	if leaves(t, "10.99.0.1:53") {
		t.Errorf("%s: UDP leaves", when)
	}
}

// restartDaemon kills the daemon. What is in force stays; what comes meanwhile is not acknowledged before the next one has it.
func (w *nodeWorld) restartDaemon(t *testing.T) {
	open, err := dial(t, "10.99.0.1:9090")
	if err != nil {
		t.Fatal(err)
	}
	if got := greeted(t, open); got != "hello\n" {
		t.Fatalf("%q", got)
	}
	w.daemon.stop(t, unix.SIGKILL)
	eventually(t, "no child without its daemon", func() bool { return len(w.children()) == 0 })
	// Right after its end the reason is that it has gone, and then that the next one is waited for.
	if err := Ready(t.Context(), w.cfg.RunDir, 0); err == nil || !strings.Contains(err.Error(), "the node's daemon") {
		t.Errorf("ready without a daemon: %v", err)
	}
	say(t, open, "still here")
	c, err := dial(t, "10.99.0.1:9090")
	if err != nil {
		t.Errorf("a new connection to what was admitted, without a daemon: %v", err)
	} else if got := greeted(t, c); got != "hello\n" {
		t.Errorf("%q", got)
	}
	for _, address := range []string{"10.99.0.1:9091", "10.98.0.1:80"} {
		if _, err := dial(t, address); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("without a daemon: to %s: %v, not refused", address, err)
		}
	}
	if leaves(t, "10.99.0.1:53") {
		t.Error("without a daemon: UDP leaves")
	}

	narrow := objects(8080).NetworkPolicies[0]
	narrow.Spec.Egress = nil
	if err := w.cp.Apply(narrow); err != nil {
		t.Fatal(err)
	}
	w.log.await(t, "attempt to cut", func(s string) bool { return strings.Contains(s, "could not be cut") })
	w.startDaemon()
	if err := w.cp.Server().Ledger().Wait(t.Context(), server.Client("shop/db")); err != nil {
		t.Fatal(err)
	}
	w.ready()
	if _, err := dial(t, "10.99.0.1:9090"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("to what is denied now: %v", err)
	}
	_ = open.SetDeadline(time.Now().Add(patience))
	if _, err := open.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("an open connection that is denied now: %v, not reset", err)
	}
	local := netip.MustParseAddrPort(open.LocalAddr().String())
	w.record("the revoked connection", func(r flows.Record) bool { return r.Source == local && r.Verdict == flows.Revoked })
	if err := w.cp.Apply(objects(8080).NetworkPolicies[0]); err != nil {
		t.Fatal(err)
	}
	if err := w.cp.Server().Ledger().Wait(t.Context(), server.Client("shop/db")); err != nil {
		t.Fatal(err)
	}
	w.enforced("with the next daemon")
}

// restartAgent kills the agent, and Envoy with it.
func (w *nodeWorld) restartAgent(t *testing.T) {
	w.agent.stop(t, unix.SIGKILL)
	w.refused("without an agent")
	w.startAgent()
	w.ready()
	w.enforced("with the next agent")
}

// changeUser has the agent come back as another user, which a container's restart never brings about: whoever that is, it is not let pass.
func (w *nodeWorld) changeUser(t *testing.T) {
	before := w.user
	for _, other := range []proxyuser.User{{UID: before.UID + 1, GID: before.GID}, {UID: before.UID, GID: before.GID + 1}} {
		w.agent.stop(t, unix.SIGKILL)
		if err := os.RemoveAll(w.cfg.RunDir); err != nil { // what is there the other could not open
			t.Fatal(err)
		}
		was, _ := w.log.read()
		w.user = other
		w.launchAgent()
		// Of another user's agent and the daemon's child, which keeps the ports for the former, one comes too late. With another group both are there.
		w.log.await(t, "refusal of "+other.String(), func(s string) bool {
			s = s[len(was):]
			return other.UID != before.UID && strings.Contains(s, "where the pod's traffic is redirected to, is taken by another process") ||
				strings.Contains(s, "the pod's agent is "+other.String()+", and the redirect exempts "+before.String())
		})
		if err := Ready(t.Context(), w.cfg.RunDir, 0); err == nil {
			t.Errorf("ready as %s", other)
		}
		if got := exempted(t); got != before {
			t.Errorf("%s is exempt, not %s", got, before)
		}
		w.refused("as " + other.String())
	}
	w.agent.stop(t, unix.SIGKILL)
	if err := os.RemoveAll(w.cfg.RunDir); err != nil {
		t.Fatal(err)
	}
	w.user = before
	w.startAgent()
	w.ready()
	w.enforced("as who it was")
}

// A sidecar of a pod that no plugin closed waits, and is found.
func TestNodeModeWithoutPlugin(t *testing.T) {
	w := newNodeWorld(t)
	w.app("[::]:8080")
	echo(t, w.outside.Listen(t, "[::]:9090"))
	w.startAgent()
	w.startPlane()
	w.startDaemon()
	// Somebody who listens there and is none of the pod's processes, as far as the kubelet's control groups go.
	w.log.await(t, "refusal", func(s string) bool { return strings.Contains(s, "in no control group of pod uid-db") })
	if err := Ready(t.Context(), w.cfg.RunDir, 0); err == nil {
		t.Error("ready")
	}
	inControlGroup(t, "poduid-db", w.agent)
	w.ready()
	w.enforced("found by the daemon")
	w.agent.stop(t, unix.SIGTERM)
	eventually(t, "no child without its agent", func() bool { return len(w.children()) == 0 })
}

// What cannot be told keeps a pod from starting; what has no sidecar is no matter.
func TestPluginFailsClosed(t *testing.T) {
	w := newNodeWorld(t)
	if err := os.RemoveAll(w.volume); err != nil {
		t.Fatal(err)
	}
	if _, err := w.cni("ADD"); err != nil {
		t.Errorf("a pod without a sidecar: %v", err)
	}
	if _, err := os.Stat(w.file("state")); err == nil {
		t.Error("a pod without a sidecar has state")
	}
	if _, err := dial(t, "10.99.0.1:1"); err == nil {
		t.Error("somebody listens there")
	}
	if !leaves(t, "10.99.0.1:53") {
		t.Error("a pod without a sidecar was closed")
	}
	if err := os.RemoveAll(w.file("k")); err != nil {
		t.Fatal(err)
	}
	if _, err := w.cni("ADD"); err == nil || !strings.Contains(err.Error(), "kubelet") {
		t.Errorf("a pod that the kubelet's folder does not know: %v", err)
	}
}
