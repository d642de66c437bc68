// Package random holds the compiler against the oracle, over random worlds.
package random

import (
	"flag"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
)

var (
	worlds = flag.Int("worlds", 50, "how many random worlds to try")
	seed   = flag.Uint64("seed", 0, "seed of the first world")
)

func indexOf(w oracle.World) (*policy.Index, error) {
	x := policy.NewIndex(policy.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"),
		PodNetwork:  w.PodNetwork,
		DefaultMode: w.Mode,
	})
	return x, x.ApplyAll(&w.Objects)
}

func key(p *corev1.Pod) string { return p.Namespace + "/" + p.Name }

// isPod leaves out pods on the host's network: to policy they are addresses.
func isPod(p *corev1.Pod) bool { return p != nil && !p.Spec.HostNetwork }

// answer asks the compiled verdicts what the oracle decides by itself.
func answer(x *policy.Index, c oracle.Conn) policy.Answer {
	to := netip.AddrPortFrom(c.ToAddr, c.Port)
	switch {
	case isPod(c.From) && !c.Plaintext:
		return x.Answer(key(c.From), c.Protocol, to)
	case isPod(c.To):
		return x.AnswerOutside(c.FromAddr, c.Protocol, to)
	}
	return policy.Answer{Allowed: true} // neither end is a pod, or an app past its sidecar talks to something that has none
}

// differ returns the first connection on which compiler and oracle differ.
func differ(w oracle.World) (c oracle.Conn, got policy.Answer, why string, found bool) {
	x, err := indexOf(w)
	if err != nil {
		return oracle.Conn{}, policy.Answer{}, err.Error(), true
	}
	for _, c := range w.Connections() {
		want, why := w.Allowed(c)
		if nobody(w, c) {
			want, why = false, "a sidecar does not connect to a pod that is not known"
		}
		if got := answer(x, c); got.Allowed != want {
			return c, got, why, true
		}
	}
	return oracle.Conn{}, policy.Answer{}, "", false
}

// nobody reports whether a sidecar is asked for an address of the pod network that no pod has. Policy may allow that; a sidecar
// fails closed until it knows who is there.
func nobody(w oracle.World, c oracle.Conn) bool {
	if isPod(c.To) || c.Plaintext || !isPod(c.From) || !oracle.Sidecar(c.From) {
		return false
	}
	for _, h := range c.From.Status.HostIPs {
		if h.IP == c.ToAddr.String() {
			return false
		}
	}
	for _, n := range w.PodNetwork {
		if n.Contains(c.ToAddr) {
			return true
		}
	}
	return false
}

func TestCompilerAgreesWithOracle(t *testing.T) {
	for i := range *worlds {
		w := oracle.Generate(rand.New(rand.NewPCG(*seed+uint64(i), 0)), oracle.Small)
		if _, _, _, found := differ(w); !found {
			continue
		}
		small := oracle.Shrink(w, func(w oracle.World) bool { _, _, _, found := differ(w); return found })
		c, got, why, _ := differ(small)
		t.Fatalf("world %d: %s\ncompiler: %+v\noracle: %s\n%s", *seed+uint64(i), c, got, why, small.YAML())
	}
}

// TestOrderOfEventsDoesNotMatter feeds the same objects in random order, with deletions and repetitions, and compares the verdicts
// with those of an index that was fed once.
func TestOrderOfEventsDoesNotMatter(t *testing.T) {
	for i := range *worlds {
		r := rand.New(rand.NewPCG(*seed+uint64(i), 1))
		w := oracle.Generate(r, oracle.Small)
		want, err := indexOf(w)
		if err != nil {
			t.Fatal(err)
		}
		x, _ := indexOf(oracle.World{PodNetwork: w.PodNetwork, Mode: w.Mode})
		all := objects(&w.Objects)
		for range 2 {
			r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
			for _, o := range all {
				if _, err := x.Apply(o); err != nil {
					t.Fatal(err)
				}
				if r.IntN(3) == 0 {
					for _, k := range x.SubjectKeys() {
						x.Verdicts(k)
					}
				}
				if r.IntN(4) == 0 {
					if _, err := x.Delete(o); err != nil {
						t.Fatal(err)
					}
					if r.IntN(2) == 0 {
						for _, k := range x.SubjectKeys() {
							x.Verdicts(k)
						}
					}
					if _, err := x.Apply(o); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		for _, p := range w.Objects.Pods {
			if !isPod(p) {
				continue
			}
			a, b := want.Subject(key(p)), x.Subject(key(p))
			if a.Key != b.Key {
				t.Fatalf("world %d: pod %s: subject %q, and %q after other events", *seed+uint64(i), key(p), a.Key, b.Key)
			}
			if want.Verdicts(a.Key).Hash() != x.Verdicts(b.Key).Hash() {
				t.Fatalf("world %d: pod %s: verdicts depend on the order of events\n%s", *seed+uint64(i), key(p), w.YAML())
			}
		}
	}
}

func objects(o *policy.Objects) []metav1.Object {
	var all []metav1.Object
	for _, n := range o.Namespaces {
		all = append(all, n)
	}
	for _, p := range o.NetworkPolicies {
		all = append(all, p)
	}
	for _, p := range o.Pods {
		all = append(all, p)
	}
	return all
}
