package random

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/agent/netfilter/packet"
	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/test/oracle/nftrules"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// TestPublishedPacketsFollowChanges wants that after each change of a world, and after several taken over as one, what is published to every
// sidecar of packet policy is what an index says that has only just read the world; and that most pods are left alone. Services lead to those
// endpoints that the oracle admits.
func TestPublishedPacketsFollowChanges(t *testing.T) {
	changed, kept, led := 0, 0, 0
	for i := range (*worlds + 14) / 15 { // each step compiles a world anew, and renders it
		c, k, l := publishedPacketsFollowChanges(t, *seed+uint64(i))
		changed, kept, led = changed+c, kept+k, led+l
	}
	if changed < *worlds || kept < *worlds || led < *worlds {
		t.Errorf("the changes altered the packets of %d pods and left those of %d, which led to %d services: too few to prove anything", changed, kept, led)
	}
	t.Logf("%d pods were published other packets, %d times a pod kept its own; they led to %d services", changed, kept, led)
}

func publishedPacketsFollowChanges(t *testing.T, s uint64) (changed, kept, led int) {
	r := rand.New(rand.NewPCG(s, 6))
	m := &mutant{Rand: r, World: oracle.Generate(r, oracle.Small), speak: selectorsOnly, protocol: corev1.ProtocolUDP}
	for _, np := range m.Objects.NetworkPolicies {
		selectorsOnly(r, np)
	}
	cp := controlPlaneOf(t, m.World)
	before := map[string]string{}
	for range *steps {
		fresh, err := indexOf(m.World)
		if err != nil {
			t.Fatal(err)
		}
		after := map[string]string{}
		for _, p := range m.running().Objects.Pods {
			if !isPod(p) || !oracle.Sidecar(p) {
				continue
			}
			name := key(p)
			want, err := server.NewResource(names.Packets, wire.PacketsMessage(fresh.Packets(name)))
			if err != nil {
				t.Fatal(err)
			}
			after[name] = publishedTo(cp, name, names.TypePackets, names.Packets)
			if after[name] != want.Version {
				t.Fatalf("world %d: %s\nthe packets published to %s are not those of a fresh index\n%s", s, strings.Join(m.story, "\n"), name, m.YAML())
			}
			n, err := servicesDiffer(m.running(), fresh, p)
			if err != nil {
				t.Fatalf("world %d: %s\n%v\n%s", s, strings.Join(m.story, "\n"), err, m.YAML())
			}
			led += n
			if before[name] == after[name] {
				kept++
			} else if before[name] != "" {
				changed++
			}
		}
		before = after
		var applied, deleted []metav1.Object
		for range 1 + r.IntN(2) {
			for _, e := range m.change() {
				// Of one object only the last state counts; what is deleted and made again in one change is applied.
				same := func(o metav1.Object) bool { return sameObject(o, e.object) }
				applied, deleted = slices.DeleteFunc(applied, same), slices.DeleteFunc(deleted, same)
				if e.gone {
					deleted = append(deleted, e.object)
				} else {
					applied = append(applied, e.object)
				}
			}
		}
		if err := cp.Update(applied, deleted); err != nil {
			t.Fatal(err)
		}
	}
	return changed, kept, led
}

// servicesDiffer holds what a pod's packets say of services, and the rules made of it, against the oracle: all endpoints that the node would
// choose from and that policy admits (one of them for a client that is to stay with one), and nothing else. It counts services that lead
// somewhere.
func servicesDiffer(w oracle.World, x *policy.Index, pod *corev1.Pod) (led int, err error) {
	value := x.Packets(key(pod))
	rules, err := packet.Emit(value, proxyMark)
	if err != nil {
		return 0, err
	}
	byName := map[string]*corev1.Pod{}
	for _, p := range w.Objects.Pods {
		byName[key(p)] = p
	}
	var vips []netip.AddrPort
	for i := range serviceAddrs {
		for _, port := range servicePorts {
			vips = append(vips, netip.AddrPortFrom(serviceAddr(i), uint16(port)))
		}
	}
	for _, to := range append(vips, elsewhere()...) {
		if !slices.ContainsFunc(oracle.Addresses(pod), func(a netip.Addr) bool { return a.Is4() == to.Addr().Is4() }) {
			continue // it cannot send there at all
		}
		d, known := x.DestinationFor(key(pod), verdict.UDP, to)
		var want []netip.AddrPort
		for _, e := range d.Endpoints {
			if e.Pod == "" && !atOwnNode(pod, e.Addr.Addr()) && slices.ContainsFunc(w.PodNetwork, func(n netip.Prefix) bool { return n.Contains(e.Addr.Addr()) }) {
				continue // the address of a pod that is gone, or claimed by two: nobody knows who that is
			}
			if _, hostPort := w.HostPort(pod, corev1.ProtocolUDP, e.Addr); e.Pod == "" && (hostPort || isNodePort(w, pod, e.Addr) || w.ExternalService(corev1.ProtocolUDP, e.Addr) != nil) {
				continue // the node would balance once more
			}
			for _, from := range oracle.Addresses(pod) {
				if from.Is4() != e.Addr.Addr().Is4() {
					continue
				}
				if ok, _ := w.Allowed(oracle.Conn{From: pod, FromAddr: from, To: byName[e.Pod], ToAddr: e.Addr.Addr(), Port: e.Addr.Port(), Protocol: verdict.UDP}); ok {
					want = append(want, e.Addr)
					break
				}
			}
		}
		service, atNode, external := slices.Contains(vips, to), isNodePort(w, pod, to), w.ExternalService(corev1.ProtocolUDP, to)
		behind, hostPort := w.HostPort(pod, corev1.ProtocolUDP, to)
		hostPort = hostPort && !service && !atNode && external == nil // those come first
		switch {
		case hostPort && (len(d.Endpoints) > 0) != behind.IsValid(), hostPort && behind.IsValid() && d.Endpoints[0].Addr != behind:
			return led, fmt.Errorf("%s is to %s %v, not the host port of %s", to, key(pod), d.Endpoints, behind)
		case hostPort:
		case external != nil && d.Service != external.Namespace+"/"+external.Name:
			return led, fmt.Errorf("%s is of service %q to %s, not of %s", to, d.Service, key(pod), external.Name)
		case external != nil && !oracle.MayCome(pod, external, to.Addr()), !service && !atNode && external == nil, d.Outside:
			want = nil // nothing for this one, or it is what it is
		}
		got, err := nftrules.Translate(rules, nftrules.Packet{Protocol: unix.IPPROTO_UDP, Source: self(to.Addr()), Dest: to.Addr(), Port: to.Port(), Out: "eth0"})
		refused := errors.Is(err, nftrules.ErrRefused)
		switch {
		case err != nil && !refused:
			return led, err
		case refused != ((atNode || external != nil || hostPort) && len(want) == 0):
			return led, fmt.Errorf("%s is refused to %s: %v", to, key(pod), refused)
		case d.Sticky && len(want) > 1 && len(got) == 1 && slices.Contains(want, got[0]):
		case !slices.Equal(got, want):
			return led, fmt.Errorf("%s is led from %s to %v, not to %v", to, key(pod), got, want)
		case service && external == nil && known && !d.Outside && value.AllowsEgress(verdict.UDP, to.Port(), to.Addr()):
			return led, fmt.Errorf("%s itself is let out of %s", to, key(pod))
		}
		if len(got) > 0 {
			led++
		}
	}
	return led, nil
}

// atOwnNode reports whether an address is of a pod's own node, as it may be inside the pod network too: the first of the node's podCIDR.
func atOwnNode(pod *corev1.Pod, a netip.Addr) bool {
	return slices.ContainsFunc(pod.Status.HostIPs, func(h corev1.HostIP) bool { return h.IP == a.String() })
}

// isNodePort reports whether a node has an address, to a pod, at which a port is a UDP service's.
func isNodePort(w oracle.World, pod *corev1.Pod, to netip.AddrPort) bool {
	atNode := atOwnNode(pod, to.Addr())
	for _, n := range w.Objects.Nodes {
		atNode = atNode || slices.ContainsFunc(n.Status.Addresses, func(a corev1.NodeAddress) bool { return a.Address == to.Addr().String() })
	}
	return atNode && slices.ContainsFunc(w.Objects.Services, func(s *corev1.Service) bool {
		return slices.ContainsFunc(s.Spec.Ports, func(p corev1.ServicePort) bool {
			return p.NodePort == int32(to.Port()) && p.Protocol == corev1.ProtocolUDP
		})
	})
}

func publishedTo(cp *controlplane.ControlPlane, pod, typeURL, resource string) string {
	st, _ := cp.Server().Ledger().Status(server.Client(pod))
	for _, r := range st.Resources {
		if r.Type == typeURL && r.Name == resource {
			return r.Wanted
		}
	}
	return "nothing"
}

// selectorsOnly makes a policy one that names pods by their labels, on every port: then addresses are in packets because of the identity that
// has them, which is what the index of packets has to know.
func selectorsOnly(r *rand.Rand, np *networkingv1.NetworkPolicy) {
	if r.IntN(4) == 0 {
		return
	}
	only := func(peers []networkingv1.NetworkPolicyPeer) []networkingv1.NetworkPolicyPeer {
		out := slices.DeleteFunc(slices.Clone(peers), func(p networkingv1.NetworkPolicyPeer) bool { return p.IPBlock != nil })
		if len(out) == 0 {
			label := map[string]string{"app": choose(r, []string{"a", "b"})}
			out = append(out, networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: label}, NamespaceSelector: &metav1.LabelSelector{}})
		}
		return out
	}
	for i := range np.Spec.Ingress {
		np.Spec.Ingress[i].From, np.Spec.Ingress[i].Ports = only(np.Spec.Ingress[i].From), nil
	}
	for i := range np.Spec.Egress {
		np.Spec.Egress[i].To, np.Spec.Egress[i].Ports = only(np.Spec.Egress[i].To), nil
	}
}

func sameObject(a, b metav1.Object) bool {
	return fmt.Sprintf("%T", a) == fmt.Sprintf("%T", b) && a.GetNamespace() == b.GetNamespace() && a.GetName() == b.GetName()
}
