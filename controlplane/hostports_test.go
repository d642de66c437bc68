package controlplane

import (
	"bytes"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/xds/server"
)

// onNode puts a pod on a node, with a host port if that is not 0.
func onNode(p *corev1.Pod, node, address string, hostPort int32, protocol corev1.Protocol) *corev1.Pod {
	p.Spec.NodeName = node
	p.Status.HostIPs = []corev1.HostIP{{IP: address}}
	if hostPort != 0 {
		p.Spec.Containers = []corev1.Container{{Ports: []corev1.ContainerPort{{ContainerPort: 8080, HostPort: hostPort, Protocol: protocol}}}}
	}
	return p
}

// TestHostPortsAreTold to the sidecars on the node, of which the outbound listener and the network are others then, and to nobody else.
func TestHostPortsAreTold(t *testing.T) {
	w := newTown(t)
	nodes := map[string]string{"n1": "192.0.2.1", "n2": "192.0.2.2"}
	var clients []string
	at := map[string]string{} // nodes, by client
	for _, node := range []string{"n1", "n1", "n2", "n2"} {
		p := onNode(w.pod("api"), node, nodes[node], 0, "")
		w.apply(p)
		name := p.Namespace + "/" + p.Name
		clients, at[name] = append(clients, name), node
	}
	server1 := w.pod("metrics")
	w.apply(onNode(server1.DeepCopy(), "n1", nodes["n1"], 0, ""))
	read := func() map[string]map[string]string {
		out := map[string]map[string]string{}
		for _, c := range clients {
			out[c] = wantedBy(w.ControlPlane, c)
		}
		return out
	}
	first := read()
	before := first
	sent := func(what string, want map[string]string) { // by node
		t.Helper()
		now := read()
		for _, c := range clients {
			var changed []string
			for _, name := range slices.Sorted(maps.Keys(now[c])) {
				if now[c][name] != before[c][name] {
					changed = append(changed, name)
				}
			}
			if got := strings.Join(changed, " "); got != want[at[c]] {
				t.Errorf("%s: %s on %s was sent %q, want %q", what, c, at[c], got, want[at[c]])
			}
		}
		before = now
	}
	w.apply(onNode(server1.DeepCopy(), "n1", nodes["n1"], 9100, ""))
	sent("a host port on n1", map[string]string{"n1": "network outbound"})
	another := onNode(w.pod("metrics"), "n2", nodes["n2"], 9100, "")
	w.apply(another)
	sent("the same on n2", map[string]string{"n2": "network outbound"})
	again := onNode(w.pod("metrics"), "n2", nodes["n2"], 9100, "")
	w.apply(again)
	sent("a second one there, in vain", nil)
	if err := w.Delete(again); err != nil {
		t.Fatal(err)
	}
	sent("that goes", nil)
	plain := onNode(w.pod("metrics"), "n2", nodes["n2"], 0, "")
	w.apply(plain)
	sent("a replica without a host port", nil)
	w.apply(onNode(server1.DeepCopy(), "n1", nodes["n1"], 9101, ""))
	sent("another one on n1", map[string]string{"n1": "network outbound"})
	w.apply(onNode(server1.DeepCopy(), "n1", nodes["n1"], 9101, corev1.ProtocolUDP))
	sent("UDP", map[string]string{"n1": "network outbound packets"})
	for _, p := range []*corev1.Pod{another, plain, server1} {
		if err := w.Delete(p); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range clients {
		if !maps.Equal(wantedBy(w.ControlPlane, c), first[c]) {
			t.Errorf("with no host port %s is not sent what it was before there was one", c)
		}
	}
}

// TestHostPortOnDemand: the cluster of a host port leads to the pod, by mTLS, for who is on its node. For others it is their own node, or what an ipBlock
// says.
func TestHostPortOnDemand(t *testing.T) {
	w := newTown(t)
	near, far := onNode(w.pod("api"), "n1", "192.0.2.1", 0, ""), onNode(w.pod("api"), "n2", "192.0.2.2", 0, "")
	db := onNode(w.pod("db"), "n1", "192.0.2.1", 9100, "")
	db.Spec.Containers[0].Ports[0].ContainerPort = 5432
	for _, p := range []*corev1.Pod{near, far, db} {
		w.apply(p)
	}
	cluster := func(client *corev1.Pod) string {
		t.Helper()
		r, ok := w.Resolve(server.Client(client.Namespace+"/"+client.Name), "od|192.0.2.1:9100")
		if !ok {
			t.Fatal("nobody has it")
		}
		c := &clusterv3.Cluster{}
		if err := r.Any.UnmarshalTo(c); err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, l := range c.LoadAssignment.GetEndpoints() {
			for _, e := range l.LbEndpoints {
				a := e.GetEndpoint().Address.GetSocketAddress()
				out = append(out, fmt.Sprintf("%s:%d", a.Address, a.GetPortValue()))
			}
		}
		return fmt.Sprint(out, strings.Contains(c.String(), "spiffe://mantlet.local/ns/shop/"))
	}
	if got, want := cluster(near), fmt.Sprintf("[%s:5432] true", db.Status.PodIPs[0].IP); got != want {
		t.Errorf("on the node: %s, want %s", got, want)
	}
	if got := cluster(far); got != "[192.0.2.1:9100] false" {
		t.Errorf("on another node: %s", got)
	}
	web := onNode(w.pod("web"), "n1", "192.0.2.1", 0, "") // whom db's policy does not name
	w.apply(web)
	if got := cluster(web); got != "[] false" {
		t.Errorf("denied by the pod: %s", got)
	}
	db.Status.PodIPs = nil // not yet, or not any more
	w.apply(db)
	if got := cluster(near); got != "[] false" {
		t.Errorf("while the pod has no address: %s", got)
	}
}

// TestRivalsForHostPortsAreLogged.
func TestRivalsForHostPortsAreLogged(t *testing.T) {
	var log bytes.Buffer
	cp, err := New(Config{Log: slog.New(slog.NewTextHandler(&log, nil)), Policy: policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"),
		PodNetwork: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16")}}}, server.Config{Authenticator: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cp.Close)
	town := &town{cp, t, 0}
	var o policy.Objects
	for _, app := range []string{"b", "a"} {
		o.Pods = append(o.Pods, onNode(town.pod(app), "n1", "192.0.2.1", 9100, ""))
	}
	if err := cp.Load(&o); err != nil {
		t.Fatal(err)
	}
	town.apply(onNode(town.pod("c"), "n2", "192.0.2.1", 9100, ""))
	town.apply(onNode(town.pod("d"), "n2", "192.0.2.1", 9100, ""))
	for _, want := range []string{`node=n1 port=9100 protocol=TCP pods="[shop/a-2 shop/b-1]"`, `node=n2 port=9100 protocol=TCP pods="[shop/c-3 shop/d-4]"`} {
		if strings.Count(log.String(), want) != 1 {
			t.Errorf("want once in the log: %s\n%s", want, log.String())
		}
	}
}
