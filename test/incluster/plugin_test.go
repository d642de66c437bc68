package incluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/agent/node"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// Node mode is taken out of the nodes as `mantlet uninstall --help` says: pods without sidecar start, the nodes' network configuration is what it was, byte
// for byte, and nothing is left. A pod that starts before node mode is back waits for it, and is enforced then.
func TestPluginRemoved(t *testing.T) {
	w := nodeMode(t)
	p, bare := newPlace(t, w, "leaving"), newPlace(t, w, "leaving-bare", "mantlet.dev/inject=disabled")
	p.admitting()
	for _, m := range w.Cluster.Nodes() {
		if now, err := networkOf(m); err != nil || !now.has(node.PluginName) {
			t.Fatalf("the network configuration of %s, before: %v, %v, want the plugin in it", m.Name, now, err)
		}
	}

	p.withoutSidecars()
	t.Cleanup(func() { // other tests need it
		if err := w.Install(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	if err := w.Install(t.Context(), "node.plugin=removed"); err != nil {
		t.Fatal(err)
	}
	for _, m := range w.Cluster.Nodes() {
		w.wantBare(t, m)
	}
	bare.apply(server("api", 2))
	bare.ready("deployment/api")
	for _, m := range w.Cluster.Nodes() {
		name := "on-" + m.Name
		bare.apply(client(name, "nodeName: "+m.Name+", "))
		bare.ready("pod/" + name)
		bare.eventually("without the plugin", name, traffic.Reached, bare.direct("api"), bare.service("api"), p.direct("api"))
	}

	// Before the plugin and the daemon are there.
	early := newPlace(t, w, "early")
	early.apply(server("api", 1), admit("api", "friend"), labelled("eager", "friend", "nodeName: node1, "), client("stranger", "nodeName: node2, "))
	for _, pod := range []string{"eager", "stranger"} {
		early.waits(pod)
	}
	if err := w.Install(t.Context()); err != nil {
		t.Fatal(err)
	}
	early.ready("deployment/api", "pod/eager", "pod/stranger")
	to := []string{early.direct("api"), early.service("api")}
	early.want("who came before the plugin and is not admitted", "stranger", traffic.Refused, to...)
	early.eventually("who came before the plugin and is admitted", "eager", traffic.Reached, to...)
	early.inForce("api")
	for _, m := range w.Cluster.Nodes() {
		early.awaitPlugin(m)
	}
}

// withoutSidecars has the pods of admitting go, or come back without sidecars, and waits until there is none in the cluster.
func (p place) withoutSidecars() {
	p.Helper()
	p.kubectl("label", "namespace", p.name, "mantlet.dev/inject-")
	p.kubectl("rollout", "restart", "deployment/api")
	p.kubectl("delete", "pod", "eager", "stranger", "--timeout="+patience.String())
	p.ready("deployment/api")
	p.await("no sidecar any more", func() error {
		s, err := p.Status(p.Context())
		if len(s.Sidecars) > 0 || len(s.Replicas) == 0 {
			return errors.Join(err, fmt.Errorf("%d are left: %+v", len(s.Sidecars), s.Sidecars))
		}
		return nil
	})
}

// wantBare wants nothing of node mode on a node.
func (w *World) wantBare(t *testing.T, m *cluster.Machine) {
	t.Helper()
	if now, err := networkOf(m); err != nil || !maps.Equal(now, w.before[m.Name]) {
		t.Errorf("the network configuration of %s: got %q, %v, want what was there before Mantlet, %q", m.Name, now, err, w.before[m.Name])
	}
	if _, err := os.Lstat(filepath.Join(m.Root(), cniBinaries, node.PluginName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the plugin's program on %s: %v, want it gone", m.Name, err)
	}
	if left, err := os.ReadDir(filepath.Join(m.Root(), "run/mantlet/node")); err != nil || len(left) > 0 {
		t.Errorf("state on %s: %v, %v, want none", m.Name, left, err)
	}
}

// The plugin goes from a node, as when the network plugin is upgraded and writes its configuration anew. It comes back, and pods that start meanwhile are
// enforced all the same.
func TestPluginLost(t *testing.T) {
	w := nodeMode(t)
	p := newPlace(t, w, "lost")
	api := p.admitting()
	m, err := w.Cluster.Machine("node1")
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range []struct {
		what string
		lose func() error
	}{
		{"its configuration", func() (err error) {
			for name, text := range w.before[m.Name] {
				err = errors.Join(err, os.WriteFile(filepath.Join(m.Root(), cniConfigurations, name), []byte(text), 0o644))
			}
			return err
		}},
		{"its program", func() error { return os.Remove(filepath.Join(m.Root(), cniBinaries, node.PluginName)) }},
	} {
		if err := c.lose(); err != nil {
			t.Fatal(err)
		}
		welcome, unwelcome := fmt.Sprintf("welcome-%d", i), fmt.Sprintf("unwelcome-%d", i)
		p.apply(labelled(welcome, "friend", "nodeName: node1, "), client(unwelcome, "nodeName: node1, "))
		p.ready("pod/"+welcome, "pod/"+unwelcome)
		p.want("without "+c.what, unwelcome, traffic.Refused, api)
		p.eventually("without "+c.what, welcome, traffic.Reached, api)
		p.awaitPlugin(m)
	}
}

// awaitPlugin waits until a node has the plugin, and its configuration names it.
func (p place) awaitPlugin(m *cluster.Machine) {
	p.Helper()
	p.await("the plugin on "+m.Name, func() error {
		now, err := networkOf(m)
		if err == nil && !now.has(node.PluginName) {
			err = errors.New("the network configuration does not name it")
		}
		_, there := os.Lstat(filepath.Join(m.Root(), cniBinaries, node.PluginName))
		return errors.Join(err, there)
	})
}

// has reports whether a file has the text.
func (f folder) has(text string) bool {
	for _, content := range f {
		if strings.Contains(content, text) {
			return true
		}
	}
	return false
}
