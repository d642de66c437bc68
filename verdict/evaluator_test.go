package verdict

import (
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
		d := NewIngress(database(c.mode)).Decide(c.proto, c.port, c.peer)
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

func TestHashTellsContentApart(t *testing.T) {
	a, b := database(Permissive), database(Permissive)
	if a.Hash() != b.Hash() {
		t.Error("equal verdicts hash differently")
	}
	b.Ingress.Blocks[0].Peers.ByIdentity[0].Verdict.Allow = false
	if a.Hash() == b.Hash() {
		t.Error("different verdicts hash alike")
	}
}
