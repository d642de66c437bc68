package random

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
)

// TestBoundNamespace binds the identities of a namespace, or of all, to the addresses of their pods, in random worlds in which pods come, go and are
// relabelled meanwhile. The rule that it is held against: each pod under its own identity fares as if nothing were bound; any other identity of the
// namespace is refused from the addresses of its pods by who is isolated, and one that pods have is refused from everywhere but from these pods.
func TestBoundNamespace(t *testing.T) {
	tried := map[string]int{}
	for i := range max(21, (*worlds+6)/7) {
		bindNamespace(t, *seed+uint64(i), tried)
	}
	for _, kind := range []string{"its own", "another's", "from elsewhere", "nobody's"} {
		if tried[kind] == 0 {
			t.Errorf("no connection tried %q: the worlds prove nothing of it", kind)
		}
	}
	t.Log(tried)
}

func bindNamespace(t *testing.T, s uint64, tried map[string]int) {
	r := rand.New(rand.NewPCG(s, 11))
	w := oracle.Generate(r, oracle.Small)
	x, err := indexOf(w)
	if err != nil {
		t.Fatal(err)
	}
	namespace := choose(r, w.Objects.Pods).Namespace
	if s%4 == 0 {
		namespace = ""
	}
	fail := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("world %d, namespace %q: %s\n%s", s, namespace, fmt.Sprintf(format, args...), w.YAML())
	}
	until := time.Unix(1000, 0)
	before := hashes(x)
	if k := unnamedSubject(before, hashes(x), x.Bind(namespace, until).Subjects); k != "" {
		fail("the verdicts of %s changed, and no delta names it", k)
	}
	// Pods move while it lasts: each is told to whom it concerns.
	for range 6 {
		before = hashes(x)
		i := r.IntN(len(w.Objects.Pods))
		p := w.Objects.Pods[i].DeepCopy()
		var named []string
		if r.IntN(3) == 0 {
			d, err := x.Delete(p)
			if err != nil {
				t.Fatal(err)
			}
			named = d.Subjects
			if k := unnamedSubject(before, hashes(x), named); k != "" {
				fail("the verdicts of %s changed as %s was deleted, and no delta names it", k, key(p))
			}
			before = hashes(x)
		} else {
			p.Labels = choose(r, w.Objects.Pods).Labels
		}
		d, err := x.Apply(p)
		if err != nil {
			t.Fatal(err)
		}
		w.Objects.Pods = slices.Clone(w.Objects.Pods)
		w.Objects.Pods[i] = p
		if k := unnamedSubject(before, hashes(x), d.Subjects); k != "" {
			fail("the verdicts of %s changed as %s was applied, and no delta names it", k, key(p))
		}
	}
	fresh, err := indexOf(w)
	if err != nil {
		t.Fatal(err)
	}
	var ids []spiffeid.ID
	owners := map[spiffeid.ID][]netip.Addr{}
	for _, p := range w.Objects.Pods {
		if sub := fresh.Subject(key(p)); sub != nil {
			ids = append(ids, sub.ID)
			owners[sub.ID] = append(owners[sub.ID], oracle.Addresses(p)...)
		}
	}
	if len(ids) == 0 {
		return
	}
	for _, c := range w.Connections() {
		if r.IntN(20) > 0 || c.Plaintext || !isPod(c.To) || !oracle.Sidecar(c.To) || fresh.Subject(key(c.To)) == nil || c.From == c.To {
			continue
		}
		isolated := len(w.Isolating(c.To, networkingv1.PolicyTypeIngress)) > 0
		admits := func(of *policy.Index, id spiffeid.ID, from netip.Addr) bool {
			return verdict.NewIngress(of.Verdicts(of.Subject(key(c.To)).Key)).Admits(c.Protocol, c.Port, verdict.Peer{ID: id, Addr: from})
		}
		id := choose(r, ids)
		ns := namespace
		if ns == "" {
			ns = pathNamespace(id)
		}
		bound := pathNamespace(id) == ns
		from := c.FromAddr
		got, without := admits(x, id, from), admits(fresh, id, from)
		switch {
		case !bound && (c.From == nil || c.From.Namespace != ns), slices.Contains(owners[id], from):
			tried["its own"]++
			if got != without {
				fail("%s as %s: admitted %t, and %t with nothing bound", c, id, got, without)
			}
		case !isolated:
			if got != without {
				fail("%s as %s, whom nobody isolates: admitted %t, and %t with nothing bound", c, id, got, without)
			}
		case bound && isPod(c.From) && c.From.Namespace == ns:
			tried["another's"]++
			if got {
				fail("%s as %s, which is another's: admitted", c, id)
			}
		case bound:
			tried["from elsewhere"]++
			if got {
				fail("%s as %s, which pods have, from elsewhere: admitted", c, id)
			}
		}
		if isolated && isPod(c.From) && fresh.Subject(key(c.From)) != nil && (namespace == "" || c.From.Namespace == namespace) {
			tried["nobody's"]++
			never := spiffeid.RequireFromSegments(id.TrustDomain(), "ns", c.From.Namespace, "sa", "default", "labels", "00000000000000000000000000000000")
			if admits(x, never, from) {
				fail("%s under an identity that nobody has: admitted", c)
			}
		}
	}
	for _, k := range x.SubjectKeys() {
		b, err := wire.Marshal(x.Verdicts(k))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := wire.Unmarshal(b); err != nil {
			fail("an agent refuses the verdicts of %s: %v", k, err)
		}
	}
	before = hashes(x)
	d := x.Expire(until)
	now := hashes(x)
	if k := unnamedSubject(before, now, d.Subjects); k != "" {
		fail("the verdicts of %s changed with the end, and no delta names it", k)
	}
	for k, h := range hashes(fresh) {
		if now[k] != h {
			fail("after the end %s has other verdicts than in an index that has never been bound", k)
		}
	}
}

func pathNamespace(id spiffeid.ID) string {
	p, err := identity.Parse(id)
	if err != nil {
		panic(err) // an Index has given it
	}
	return p.Namespace
}
