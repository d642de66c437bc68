package oracle

import (
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/verdict"
)

func seeded(seed uint64) World { return Generate(rand.New(rand.NewPCG(seed, 0)), Small) }

func TestGenerateIsDeterministic(t *testing.T) {
	for seed := range uint64(20) {
		a, b := seeded(seed), seeded(seed)
		if a.YAML() != b.YAML() {
			t.Fatalf("seed %d gives two worlds", seed)
		}
		if !slices.Equal(texts(a.Connections()), texts(b.Connections())) {
			t.Fatalf("seed %d gives two lists of connections", seed)
		}
	}
	if seeded(1).YAML() == seeded(2).YAML() {
		t.Error("two seeds give the same world")
	}
}

func texts(list []Conn) []string {
	out := make([]string, 0, len(list))
	for _, c := range list[:min(len(list), 2000)] {
		out = append(out, c.String())
	}
	return out
}

// TestGenerateMeetsCorners counts, over some seeds, what the worlds are for: every way in which a connection is decided.
func TestGenerateMeetsCorners(t *testing.T) {
	met := map[string]int{}
	for seed := range uint64(40) {
		w := seeded(seed)
		if n := len(w.Objects.Pods); n < 2 || n > Small.Pods {
			t.Fatalf("seed %d: %d pods", seed, n)
		}
		r := rand.New(rand.NewPCG(seed, 1))
		for _, c := range w.Connections() {
			if r.IntN(20) > 0 {
				continue
			}
			ok, why := w.Allowed(c)
			kind, _, rule := strings.Cut(why, "/")
			if rule && strings.HasPrefix(kind, "ns") {
				kind = "a rule"
			}
			if strings.HasPrefix(why, "no ") {
				kind, _, _ = strings.Cut(why, " of ")
			}
			if ok {
				met["allowed: "+kind]++
			} else {
				met["denied: "+kind]++
			}
		}
	}
	for _, want := range []string{
		"allowed: a rule", "allowed: a pod to itself", "allowed: from the destination's own node", "allowed: to the source's own node",
		"allowed: no sidecar on the way: nothing is enforced", "allowed: no policy isolates the destination for ingress",
		"allowed: no policy isolates the destination, and it is permissive", "denied: no ingress rule", "denied: no egress rule",
		"denied: plaintext at a strict workload", "denied: plaintext at an isolated workload from a pod that has a sidecar",
		"denied: plaintext at a strict workload from inside the pod network", "denied: from an address in the pod network that is no pod's",
	} {
		if met[want] < 10 {
			t.Errorf("%q came up %d times", want, met[want])
		}
	}
	t.Log(met)
}

// TestGenerateMakesHardPods counts the pods that a compiler by identity gets wrong first.
func TestGenerateMakesHardPods(t *testing.T) {
	for _, key := range []string{volatileName, volatileHash} {
		if !slices.Contains(identity.VolatileLabels(), key) {
			t.Fatalf("%s is not volatile: replicas that differ in it share no identity", key)
		}
	}
	n := identity.NewNamer(spiffeid.RequireTrustDomainFromString("mantlet.local"), identity.VolatileLabels())
	id := func(p *corev1.Pod) spiffeid.ID {
		id, err := n.ID(identity.Workload{Namespace: p.Namespace, ServiceAccount: p.Spec.ServiceAccountName, Labels: p.Labels})
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	met := map[string]int{}
	for seed := range uint64(100) {
		pods := seeded(seed).Objects.Pods
		for i, a := range pods {
			count := func(what string, holds bool) {
				if holds {
					met[what]++
				}
			}
			count("on the host's network", a.Spec.HostNetwork)
			count("one address family", len(a.Status.PodIPs) == 1)
			count("a container that never serves", len(a.Spec.InitContainers) == 1 && a.Spec.InitContainers[0].RestartPolicy == nil)
			for _, b := range pods[:i] {
				if id(a) != id(b) {
					continue
				}
				count("one identity, other volatile labels", !maps.Equal(a.Labels, b.Labels))
				count("one identity, other ports", !equality.Semantic.DeepEqual(a.Spec.Containers, b.Spec.Containers))
				count("one identity, a sidecar or none", Sidecar(a) != Sidecar(b))
				count("one identity, another node", a.Spec.NodeName != b.Spec.NodeName)
			}
		}
	}
	for _, want := range []string{"on the host's network", "one address family", "a container that never serves", "one identity, other volatile labels",
		"one identity, other ports", "one identity, a sidecar or none", "one identity, another node"} {
		if met[want] < 20 {
			t.Errorf("%s: %d in 100 worlds", want, met[want])
		}
	}
	t.Log(met)
}

// TestBlocksAreValid holds the generator to what the API server would accept.
func TestBlocksAreValid(t *testing.T) {
	excepts := 0
	for seed := range uint64(200) {
		for _, np := range seeded(seed).Objects.NetworkPolicies {
			for _, peer := range allPeers(np) {
				if peer.IPBlock == nil {
					if peer.PodSelector == nil && peer.NamespaceSelector == nil {
						t.Fatalf("seed %d: a peer without anything", seed)
					}
					continue
				}
				cidr := netip.MustParsePrefix(peer.IPBlock.CIDR)
				for _, e := range peer.IPBlock.Except {
					excepts++
					if p := netip.MustParsePrefix(e); !cidr.Contains(p.Addr()) || p.Bits() <= cidr.Bits() {
						t.Fatalf("seed %d: %s except %s", seed, cidr, e)
					}
				}
			}
		}
	}
	if excepts < 50 {
		t.Errorf("only %d exceptions", excepts)
	}
}

func TestShrink(t *testing.T) {
	w := seeded(3)
	before := w.YAML()
	// a failure that needs one policy with an ipBlock, and one pod
	fails := func(w World) bool {
		return len(w.Objects.Pods) > 0 && slices.ContainsFunc(w.Objects.NetworkPolicies, func(np *networkingv1.NetworkPolicy) bool {
			return slices.ContainsFunc(allPeers(np), func(p peerOf) bool { return p.IPBlock != nil })
		})
	}
	if !fails(w) {
		t.Fatal("seed 3 has no ipBlock: choose another")
	}
	small := Shrink(w, fails)
	if !fails(small) {
		t.Fatal("the shrunk world does not fail")
	}
	if len(small.Objects.Pods) != 1 || len(small.Objects.NetworkPolicies) != 1 || len(allPeers(small.Objects.NetworkPolicies[0])) != 1 || len(small.Objects.Pods[0].Labels) != 0 {
		t.Errorf("more left than needed:\n%s", small.YAML())
	}
	if w.YAML() != before {
		t.Error("Shrink changed the world it was given")
	}
}

// TestLast pins the edge that Connections leans on.
func TestLast(t *testing.T) {
	for in, want := range map[string]string{"10.0.0.0/8": "10.255.255.255", "10.64.1.77/20": "10.64.15.255", "0.0.0.0/0": "255.255.255.255", "10.1.2.3/32": "10.1.2.3", "fd00::/127": "fd00::1"} {
		if got := last(netip.MustParsePrefix(in)); got.String() != want {
			t.Errorf("last address of %s is %s, should be %s", in, got, want)
		}
	}
}

func TestConnectionsCover(t *testing.T) {
	w := shop(t, in("shop", "{from: [{ipBlock: {cidr: 198.51.100.0/24}}], ports: [{port: 80, endPort: 90}]}"))
	list := w.Connections()
	for _, want := range []string{
		"198.51.100.0 > shop/db 80", "198.51.99.255 > shop/db 80", "198.51.100.255 > shop/db 91/UDP", "198.51.101.0 > shop/db 79",
		"shop/web > shop/db 5432", "shop/web > shop/db@6 90/SCTP", "shop/web ~ strict/db 80", "shop/web > 198.51.100.0 80", "shop/web > shop/web 80",
	} {
		if !slices.Contains(list, attempt(t, w, want)) {
			t.Errorf("%s is not among the %d connections", want, len(list))
		}
	}
	for _, c := range list {
		if c.Protocol < verdict.TCP || c.Protocol > verdict.SCTP || c.Port == 0 || c.FromAddr.Is4() != c.ToAddr.Is4() {
			t.Fatalf("impossible connection %s", c)
		}
	}
}
