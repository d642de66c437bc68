package random

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/test/oracle/matcher"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds"
	"github.com/mantlet/mantlet/xds/names"
)

// TestRetiredIdentities relabels a running pod of random worlds and plays it showing its old certificate. The rule that it is held against is
// short enough to need no second evaluator: where the oracle says that the destination is isolated, nobody gets in by that identity from
// there; everything else is as in a world that never knew the old labels.
func TestRetiredIdentities(t *testing.T) {
	tried := map[string]int{}
	for i := range max(21, (*worlds+6)/7) { // each connection is decided, and interpreted, many times
		relabel(t, *seed+uint64(i), tried)
	}
	for _, kind := range []string{"refused, and a twin is not", "refused, and anyone is not", "not isolated"} {
		if tried[kind] == 0 {
			t.Errorf("no connection tried %q: the worlds prove nothing of it", kind)
		}
	}
	t.Log(tried)
}

func relabel(t *testing.T, s uint64, tried map[string]int) {
	r := rand.New(rand.NewPCG(s, 7))
	w := oracle.Generate(r, oracle.Small)
	var choices, twins []int
	for i, p := range w.Objects.Pods {
		if !isPod(p) || !oracle.Sidecar(p) || len(oracle.Addresses(p)) == 0 {
			continue
		}
		choices = append(choices, i)
		if slices.ContainsFunc(w.Objects.Pods, func(q *corev1.Pod) bool {
			return q != p && isPod(q) && p.Namespace == q.Namespace && p.Spec.ServiceAccountName == q.Spec.ServiceAccountName && maps.Equal(p.Labels, q.Labels)
		}) {
			twins = append(twins, i)
		}
	}
	if s%3 == 0 && len(twins) > 0 {
		choices = twins
	}
	if len(choices) == 0 {
		return
	}
	at := choose(r, choices)
	was := w.Objects.Pods[at]
	is := was.DeepCopy()
	is.Labels = choose(r, w.Objects.Pods).Labels
	after := w
	after.Objects.Pods = slices.Clone(w.Objects.Pods)
	after.Objects.Pods[at] = is

	x, err := indexOf(w)
	if err != nil {
		t.Fatal(err)
	}
	old := x.Subject(key(was)).ID
	hashes(x) // as they were read before
	fail := func(format string, args ...any) {
		t.Helper()
		t.Fatalf("world %d: %s, from %v to %v: %s\n%s", s, key(was), was.Labels, is.Labels, fmt.Sprintf(format, args...), after.YAML())
	}
	if _, err := x.Apply(is); err != nil {
		t.Fatal(err)
	}
	if x.Subject(key(is)).ID == old {
		return
	}
	fresh, err := indexOf(after)
	if err != nil {
		t.Fatal(err)
	}
	until := time.Unix(1000, 0)
	before := hashes(x)
	var named []string
	for _, a := range oracle.Addresses(was) {
		named = append(named, x.Retire(old, a, until).Subjects...)
	}
	if k := unnamedSubject(before, hashes(x), named); k != "" {
		fail("the verdicts of %s changed, and no delta names it", k)
	}

	gates, filters := map[string]*listenerv3.Listener{}, map[string]*corev3.TypedExtensionConfig{}
	for _, k := range x.SubjectKeys() {
		gates[k], filters[k] = xds.Gate(x.Verdicts(k)), xds.RBAC(x.Verdicts(k))
	}
	emittedFor := func(p *corev1.Pod) (*listenerv3.Listener, *corev3.TypedExtensionConfig) {
		k := x.Subject(key(p)).Key
		return gates[k], filters[k]
	}
	// Nobody else notices.
	for _, c := range after.Connections() {
		if r.IntN(30) > 0 && c.From != is || r.IntN(3) > 0 {
			continue
		}
		if a, b := fresh.Answer(fromKey(c), c.Protocol, netip.AddrPortFrom(c.ToAddr, c.Port)), x.Answer(fromKey(c), c.Protocol, netip.AddrPortFrom(c.ToAddr, c.Port)); a != b && isPod(c.From) {
			fail("%s: %+v, without anything retired %+v", c, b, a)
		}
		if c.From == is && c.To != is && isPod(c.To) && oracle.Sidecar(c.To) && !c.Plaintext {
			gate, filter := emittedFor(c.To)
			showOld(fail, after, x, fresh, c, old, tried)
			interpretOld(fail, gate, filter, c, old, len(after.Isolating(c.To, networkingv1.PolicyTypeIngress)) > 0)
		}
	}
	for _, k := range x.SubjectKeys() {
		v := x.Verdicts(k)
		b, err := wire.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := wire.Unmarshal(b); err != nil {
			fail("an agent refuses the verdicts of %s: %v", k, err)
		}
	}

	// The old labels once more: the identity is good from there again. Then it ends for good.
	if _, err := x.Apply(was); err != nil {
		t.Fatal(err)
	}
	for _, c := range w.Connections() {
		if r.IntN(30) > 0 {
			continue
		}
		if want, why := w.Allowed(c); !nobody(w, c) && answer(x, c).Allowed != want {
			fail("labelled as before, %s: %+v; oracle: %s", c, answer(x, c), why)
		}
	}
	if _, err := x.Apply(is); err != nil {
		t.Fatal(err)
	}
	if next, ok := x.NextExpiry(); !ok || !next.Equal(until) {
		fail("the next expiry is %s, %t", next, ok)
	}
	x.Expire(until.Add(-1))
	before = hashes(x)
	d := x.Expire(until)
	now := hashes(x)
	if k := unnamedSubject(before, now, d.Subjects); k != "" {
		fail("the verdicts of %s changed with the expiry, and no delta names it", k)
	}
	for k, h := range hashes(fresh) {
		if now[k] != h {
			fail("after the expiry %s has other verdicts than in an index that has never heard of it", k)
		}
	}
	if _, ok := x.NextExpiry(); ok {
		fail("something is left to expire")
	}
}

// showOld has the relabelled pod make a connection under its old identity, and others do so from elsewhere.
func showOld(fail func(string, ...any), w oracle.World, x, fresh *policy.Index, c oracle.Conn, old spiffeid.ID, tried map[string]int) {
	admits := func(x *policy.Index, from netip.Addr) bool {
		v := x.Verdicts(x.Subject(key(c.To)).Key)
		return verdict.NewIngress(v).Admits(c.Protocol, c.Port, verdict.Peer{ID: old, Addr: from})
	}
	isolated := len(w.Isolating(c.To, networkingv1.PolicyTypeIngress)) > 0
	got, without := admits(x, c.FromAddr), admits(fresh, c.FromAddr)
	switch {
	case got == isolated:
		fail("%s under the old identity: admitted %t, and the destination is isolated: %t", c, got, isolated)
	case !isolated:
		tried["not isolated"]++
	case without && slices.ContainsFunc(w.Objects.Pods, func(p *corev1.Pod) bool {
		return isPod(p) && fresh.Subject(key(p)) != nil && fresh.Subject(key(p)).ID == old
	}):
		tried["refused, and a twin is not"]++
	case without:
		tried["refused, and anyone is not"]++
	}
	for _, other := range []string{"10.64.0.12", "10.64.1.11", "203.0.113.9", "2001:db8:ffff::9"} {
		from := netip.MustParseAddr(other)
		if slices.Contains(oracle.Addresses(c.From), from) || from.Is4() != c.FromAddr.Is4() {
			continue
		}
		if got, want := admits(x, from), admits(fresh, from); got != want {
			fail("%s under the old identity, but from %s: admitted %t, and %t with nothing retired", c, from, got, want)
		}
	}
}

// interpretOld has Envoy's matchers decide on it.
func interpretOld(fail func(string, ...any), gate *listenerv3.Listener, filter *corev3.TypedExtensionConfig, c oracle.Conn, old spiffeid.ID, isolated bool) {
	if c.Protocol != verdict.TCP {
		return
	}
	m := matcher.Connection{DestinationIP: c.ToAddr, DestinationPort: c.Port, SourceIP: c.FromAddr, FilterState: map[string]string{names.PeerID: old.String()}}
	if chain, err := matcher.FilterChain(gate, m); err != nil || (chain == names.ChainDeny) != isolated {
		fail("%s under the old identity: the gate picks %s, %v", c, chain, err)
	}
	m.FilterState, m.TransportProtocol, m.TLS = nil, "tls", &matcher.TLS{URISANs: []string{old.String()}}
	if ruling, err := matcher.RBAC(filter, m); err != nil || ruling.Allowed == isolated {
		fail("%s under the old identity: rbac says %+v, %v", c, ruling, err)
	}
}

func fromKey(c oracle.Conn) string {
	if c.From == nil {
		return ""
	}
	return key(c.From)
}

func hashes(x *policy.Index) map[string]string {
	out := map[string]string{}
	for _, k := range x.SubjectKeys() {
		out[k] = fmt.Sprint(x.Hashes(k))
	}
	return out
}

// unnamedSubject is a subject whose verdicts have changed without its being named.
func unnamedSubject(before, after map[string]string, named []string) string {
	for k, h := range after {
		if before[k] != "" && before[k] != h && !slices.Contains(named, k) {
			return k
		}
	}
	return ""
}
