package verdict

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var (
	api   = spiffeid.RequireFromString("spiffe://mantlet.local/ns/shop/sa/api/labels/a")
	batch = spiffeid.RequireFromString("spiffe://mantlet.local/ns/shop/sa/batch/labels/b")
	web   = spiffeid.RequireFromString("spiffe://mantlet.local/ns/shop/sa/web/labels/c")
)

// database admits api on 5432, one pod of batch on 5432, and 203.0.113.0/24 but its upper half on 8000-8010, which is denied.
func database(mode Mode) *Verdicts {
	prefix := netip.MustParsePrefix
	return &Verdicts{Mode: mode, Ingress: Table{
		Isolating: []string{"shop/db"},
		Rules: []Rule{
			{Policy: "shop/db", Rule: "ingress[0]", Peers: "pods app=api", Ports: "5432/TCP"},
			{Policy: "shop/db", Rule: "ingress[1]", Peers: "ipBlock 203.0.113.0/24", Ports: "8000-8010/TCP"},
		},
		Reasons: []Reason{
			{Policy: "shop/db", Rule: "ingress[0]", Text: "admits"}, {Text: "another pod of the identity"},
			{Policy: "shop/db", Rule: "ingress[1]", Text: "admits block"}, {Text: "carved out"},
		},
		Blocks: []Block{
			{TCP, []PortRange{{5432, 5432}}, Peers{ByIdentity: []Identity{
				{ID: api, Verdict: Verdict{true, 0}},
				{ID: batch, Verdict: Verdict{false, 1}, Addresses: []Prefix{{prefix("10.64.0.9/32"), Verdict{true, 0}}}},
			}}},
			{TCP, []PortRange{{8000, 8010}}, Peers{Anonymous: []Prefix{
				{prefix("203.0.113.0/24"), Verdict{true, 2}}, {prefix("203.0.113.128/25"), Verdict{false, 3}},
			}}},
		},
	}}
}

func TestDecide(t *testing.T) {
	addr := netip.MustParseAddr
	for _, c := range []struct {
		what  string
		mode  Mode
		proto Protocol
		port  uint16
		peer  Peer
		allow bool
		rule  string
		text  string
	}{
		{"a listed identity", Permissive, TCP, 5432, Peer{ID: api, Addr: addr("10.64.0.3")}, true, "ingress[0]", "admits"},
		{"the same over an IPv4-mapped address", Permissive, TCP, 5432, Peer{ID: batch, Addr: addr("::ffff:10.64.0.9")}, true, "ingress[0]", "admits"},
		{"the right identity from the wrong address", Permissive, TCP, 5432, Peer{ID: batch, Addr: addr("10.64.0.8")}, false, "", "another pod"},
		{"the right peer, the wrong port", Permissive, TCP, 5433, Peer{ID: api, Name: "shop/api-0", Addr: addr("10.64.0.3")}, false, "ingress[0]",
			"peer shop/api-0 matches ingress[0] of shop/db, but port 5433/TCP is not 5432/TCP"},
		{"the right peer, the wrong protocol", Permissive, UDP, 5432, Peer{ID: api, Addr: addr("10.64.0.3")}, false, "ingress[0]", "but port 5432/UDP is not 5432/TCP"},
		{"the wrong peer, the right port", Permissive, TCP, 5432, Peer{ID: web, Name: "shop/web-0", Addr: addr("10.64.0.2")}, false, "ingress[0]", "shop/web-0 is not among them"},
		{"nothing right", Permissive, TCP, 22, Peer{ID: web, Addr: addr("10.64.0.2")}, false, "", "none admits port 22/TCP"},
		{"an address in a block", Permissive, TCP, 8005, Peer{Addr: addr("203.0.113.5")}, true, "ingress[1]", "admits block"},
		{"an address in its exception", Permissive, TCP, 8005, Peer{Addr: addr("203.0.113.200")}, false, "", "carved out"},
		{"a block's address on another port", Permissive, TCP, 8011, Peer{Addr: addr("203.0.113.5")}, false, "ingress[1]", "port 8011/TCP is not 8000-8010/TCP"},
		{"an identity is not matched by a block for those without", Permissive, TCP, 8005, Peer{ID: web, Addr: addr("203.0.113.5")}, false, "ingress[1]", "not among them"},
		{"plaintext at a strict subject", Strict, TCP, 5432, Peer{Name: "shop/old-0", Addr: addr("10.64.0.7")}, false, "", "shop/old-0 shows no identity"},
		{"no address at all", Permissive, TCP, 8005, Peer{}, false, "", "ipBlock"},
		{"no such protocol", Permissive, Protocol(9), 5432, Peer{ID: api}, false, "", "not"},
	} {
		e := NewIngress(database(c.mode))
		d := e.Decide(c.proto, c.port, c.peer)
		if e.Allows(c.proto, c.port, c.peer) != d.Allowed {
			t.Errorf("%s: Allows differs from Decide: %+v", c.what, d)
		}
		if d.Allowed != c.allow || !strings.Contains(d.Reason.Text, c.text) || (c.rule != "" && d.Reason.Rule != c.rule) {
			t.Errorf("%s: %+v; want allowed=%v, rule %q, …%s…", c.what, d, c.allow, c.rule, c.text)
		}
	}
}

func TestZeroVerdictsDeny(t *testing.T) {
	v := &Verdicts{}
	for _, e := range []*Evaluator{NewIngress(v), NewEgress(v)} {
		if d := e.Decide(TCP, 80, Peer{ID: api, Addr: netip.MustParseAddr("10.64.0.3")}); d.Allowed {
			t.Errorf("verdicts that say nothing allow: %+v", d)
		}
	}
}

// TestManyPeers holds lists that are indexed against the same that are looked through.
func TestManyPeers(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		list := make([]Prefix, 0, 40)
		seen := map[netip.Prefix]bool{}
		for range 1 + random.IntN(40) {
			a := netip.AddrFrom4([4]byte{10, 0, byte(random.IntN(4)), byte(random.IntN(256))})
			if random.IntN(3) == 0 {
				a = netip.AddrFrom16([16]byte{0xfd, 15: byte(random.IntN(256))})
			}
			p := netip.PrefixFrom(a, random.IntN(a.BitLen()+1)).Masked()
			if !seen[p] {
				seen[p] = true
				list = append(list, Prefix{p, Verdict{random.IntN(2) == 0, len(list)}})
			}
		}
		indexed, looked := newPrefixIndex(list), prefixIndex{list: list}
		if (indexed.trie != nil) != (len(list) > few) {
			t.Fatalf("%d prefixes: indexed %t", len(list), indexed.trie != nil)
		}
		for range 100 {
			a := netip.AddrFrom4([4]byte{10, 0, byte(random.IntN(5)), byte(random.IntN(256))})
			if random.IntN(3) == 0 {
				a = netip.AddrFrom16([16]byte{0xfd, 15: byte(random.IntN(256))}).WithZone("eth0")
			}
			v, found := looked.lookup(a)
			if want, listed := indexed.lookup(a); v != want || found != listed {
				t.Fatalf("%s in %v: %v %t, indexed %v %t", a, list, v, found, want, listed)
			}
		}
	}
	var ids []Identity
	for i := range few + 5 {
		id := spiffeid.RequireFromString(fmt.Sprintf("spiffe://mantlet.local/ns/shop/sa/%02d/labels/a", i))
		ids = append(ids, Identity{ID: id, Verdict: Verdict{i%2 == 0, i}, Addresses: []Prefix{{netip.MustParsePrefix(fmt.Sprintf("10.64.0.%d/32", i)), Verdict{i%2 == 1, i}}}})
	}
	indexed, looked := newIdentityIndex(ids), identityIndex{list: ids}
	for i := range ids {
		for _, a := range []string{"10.64.0.3", fmt.Sprintf("10.64.0.%d", i)} {
			peer := Peer{ID: ids[i].ID, Addr: netip.MustParseAddr(a)}
			v, found := looked.lookup(peer)
			if want, listed := indexed.lookup(peer); v != want || found != listed || !found {
				t.Errorf("%s from %s: %v %t, indexed %v %t", peer.ID, a, v, found, want, listed)
			}
		}
	}
	if _, found := indexed.lookup(Peer{ID: api}); found {
		t.Error("an identity is found that is not listed")
	}
}

// TestHashTellsContentApart changes every field.
func TestHashTellsContentApart(t *testing.T) {
	seen := map[string]string{database(Permissive).Hash(): "nothing"}
	if _, same := seen[database(Permissive).Hash()]; !same {
		t.Error("equal verdicts hash differently")
	}
	for what, change := range map[string]func(*Verdicts){
		"subject":                func(v *Verdicts) { v.Subject = web },
		"mode":                   func(v *Verdicts) { v.Mode = Strict },
		"isolating":              func(v *Verdicts) { v.Ingress.Isolating[0] = "shop/other" },
		"one more that isolates": func(v *Verdicts) { v.Ingress.Isolating = append(v.Ingress.Isolating, "shop/z") },
		"rule's policy":          func(v *Verdicts) { v.Ingress.Rules[0].Policy = "shop/other" },
		"rule":                   func(v *Verdicts) { v.Ingress.Rules[0].Rule = "ingress[7]" },
		"rule's peers":           func(v *Verdicts) { v.Ingress.Rules[0].Peers = "anyone" },
		"rule's ports":           func(v *Verdicts) { v.Ingress.Rules[0].Ports = "1/TCP" },
		"rule less":              func(v *Verdicts) { v.Ingress.Rules = v.Ingress.Rules[:1] },
		"reason's policy":        func(v *Verdicts) { v.Ingress.Reasons[0].Policy = "shop/other" },
		"reason's rule":          func(v *Verdicts) { v.Ingress.Reasons[0].Rule = "ingress[7]" },
		"reason's text":          func(v *Verdicts) { v.Ingress.Reasons[0].Text = "other" },
		"nearest":                func(v *Verdicts) { v.Ingress.Reasons[0].Nearest = true },
		"reason's direction":     func(v *Verdicts) { v.Ingress.Reasons[0].Direction = "ingress" },
		"protocol":               func(v *Verdicts) { v.Ingress.Blocks[0].Protocol = UDP },
		"first port":             func(v *Verdicts) { v.Ingress.Blocks[0].Ports[0].First = 1 },
		"last port":              func(v *Verdicts) { v.Ingress.Blocks[0].Ports[0].Last = 6000 },
		"identity":               func(v *Verdicts) { v.Ingress.Blocks[0].Peers.ByIdentity[0].ID = web },
		"verdict":                func(v *Verdicts) { v.Ingress.Blocks[0].Peers.ByIdentity[0].Verdict.Allow = false },
		"verdict's reason":       func(v *Verdicts) { v.Ingress.Blocks[0].Peers.ByIdentity[0].Verdict.Reason = 1 },
		"address":                func(v *Verdicts) { v.Ingress.Blocks[0].Peers.ByIdentity[1].Addresses[0].Prefix = host4(8, 32) },
		"length of a prefix":     func(v *Verdicts) { v.Ingress.Blocks[0].Peers.ByIdentity[1].Addresses[0].Prefix = host4(9, 31) },
		"verdict on an address":  func(v *Verdicts) { v.Ingress.Blocks[0].Peers.ByIdentity[1].Addresses[0].Verdict.Allow = false },
		"family": func(v *Verdicts) {
			v.Ingress.Blocks[0].Peers.ByIdentity[1].Addresses[0].Prefix = netip.PrefixFrom(netip.AddrFrom16(host4(9, 32).Addr().As16()), 32)
		},
		"identified": func(v *Verdicts) { p := &v.Ingress.Blocks[1].Peers; p.Identified, p.Anonymous = p.Anonymous, nil },
		"anonymous":  func(v *Verdicts) { p := &v.Ingress.Blocks[1].Peers; p.Anonymous = p.Anonymous[:1] },
		"block less": func(v *Verdicts) { v.Ingress.Blocks = v.Ingress.Blocks[:1] },
		"direction":  func(v *Verdicts) { v.Ingress, v.Egress = v.Egress, v.Ingress },
	} {
		v := database(Permissive)
		change(v)
		if as, ok := seen[v.Hash()]; ok {
			t.Errorf("%s: hashes as with %s changed", what, as)
		}
		seen[v.Hash()] = what
	}
	a, b := database(Permissive), database(Permissive)
	if a.Ingress.Hash() != b.Ingress.Hash() || a.Ingress.Hash() == a.Egress.Hash() {
		t.Error("tables: equal ones hash differently, or different ones alike")
	}
	p, q := a.Ingress.Blocks[0].Peers, b.Ingress.Blocks[1].Peers
	if p.Hash() != b.Ingress.Blocks[0].Peers.Hash() || p.Hash() == q.Hash() {
		t.Error("peers: equal ones hash differently, or different ones alike")
	}
}

func host4(last byte, bits int) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 64, 0, last}), bits)
}
