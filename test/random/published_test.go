package random

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// TestPublishedPacketsFollowChanges wants that after each change of a world, and after several taken over as one, what is published to every
// sidecar of packet policy is what an index says that has only just read the world; and that most pods are left alone.
func TestPublishedPacketsFollowChanges(t *testing.T) {
	changed, kept := 0, 0
	for i := range (*worlds + 14) / 15 { // each step compiles a world anew, and renders it
		c, k := publishedPacketsFollowChanges(t, *seed+uint64(i))
		changed, kept = changed+c, kept+k
	}
	if changed < *worlds || kept < changed {
		t.Errorf("the changes altered the packets of %d pods and left those of %d: too few to prove anything", changed, kept)
	}
	t.Logf("%d pods were published other packets, %d times a pod kept its own", changed, kept)
}

func publishedPacketsFollowChanges(t *testing.T, s uint64) (changed, kept int) {
	r := rand.New(rand.NewPCG(s, 6))
	m := &mutant{Rand: r, World: oracle.Generate(r, oracle.Small), speak: selectorsOnly}
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
			after[name] = publishedTo(cp, name)
			if after[name] != want.Version {
				t.Fatalf("world %d: %s\nthe packets published to %s are not those of a fresh index\n%s", s, strings.Join(m.story, "\n"), name, m.YAML())
			}
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
	return changed, kept
}

func publishedTo(cp *controlplane.ControlPlane, pod string) string {
	st, _ := cp.Server().Ledger().Status(server.Client(pod))
	for _, r := range st.Resources {
		if r.Type == names.TypePackets && r.Name == names.Packets {
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
