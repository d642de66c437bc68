package hold

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/mantlet/mantlet/verdict"
)

func allow(prefix string) verdict.Prefix {
	return verdict.Prefix{Prefix: netip.MustParsePrefix(prefix), Verdict: verdict.Verdict{Allow: true}}
}

func deny(prefix string) verdict.Prefix {
	return verdict.Prefix{Prefix: netip.MustParsePrefix(prefix)}
}

func egress(blocks ...verdict.Block) verdict.Table {
	return verdict.Table{Reasons: []verdict.Reason{{Text: "a rule"}}, Blocks: blocks}
}

func TestExternal(t *testing.T) {
	connect(t)
	route(t, "192.0.2.0/24", "10.99.0.1")
	route(t, "198.51.100.0/24", "10.99.0.1")
	route(t, "2001:db8::/32", "fd99::1")
	p := asker(func(context.Context, netip.AddrPort) (bool, error) { return true, nil })
	h := open(t, config(), p)
	start(t, h)
	expect(t, "192.0.2.1:443", refused) // empty never means any
	expect(t, "[2001:db8::1]:443", refused)
	if err := h.SetExternal(egress(
		verdict.Block{Protocol: verdict.TCP, Ports: []verdict.PortRange{{First: 443, Last: 443}, {First: 8000, Last: 8010}}, Peers: verdict.Peers{Anonymous: []verdict.Prefix{
			allow("192.0.2.0/24"), deny("192.0.2.128/25"), allow("192.0.2.130/32"), allow("2001:db8::/64"), deny("2001:db8::/120")}}},
		verdict.Block{Protocol: verdict.UDP, Ports: []verdict.PortRange{{First: 53, Last: 53}}, Peers: verdict.Peers{Anonymous: []verdict.Prefix{allow("0.0.0.0/0")}}},
	)); err != nil {
		t.Fatal(err)
	}
	for a, want := range map[string]string{
		"192.0.2.1:443": "192.0.2.1:443", "192.0.2.1:8000": "192.0.2.1:8000", "192.0.2.127:8010": "192.0.2.127:8010",
		"192.0.2.1:8011": refused, "192.0.2.1:7999": refused, "192.0.2.1:53": refused, "192.0.2.128:443": refused, "192.0.2.129:443": refused,
		"192.0.2.130:443": "192.0.2.130:443", "192.0.2.131:443": refused, "198.51.100.1:443": refused,
		"[2001:db8::ff]:443": refused, "[2001:db8::100]:443": "[2001:db8::100]:443", "[2001:db8:0:1::]:443": refused,
		"10.99.0.1:443": "10.99.0.1:443", // inside the cluster somebody is asked
	} {
		expect(t, a, want)
	}
	if n := p.total(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	if err := h.SetExternal(anywhere()); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"192.0.2.129:1", "198.51.100.1:65535", "[2001:db8::ff]:80"} {
		expect(t, a, a)
	}
	if err := h.SetExternal(verdict.Table{}); err != nil {
		t.Fatal(err)
	}
	expect(t, "192.0.2.1:443", refused)
}

// The flattened ranges say what the evaluator of verdicts says.
func TestFlattenAgreesWithEvaluator(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		seen := map[netip.Prefix]bool{}
		var prefixes []verdict.Prefix
		for range rnd.IntN(12) {
			var p netip.Prefix
			if rnd.IntN(2) == 0 { // at both ends of the address space, too
				a := [4]byte{[]byte{0, 10, 255}[rnd.IntN(3)], byte(rnd.IntN(2) * 255), byte(rnd.IntN(4)), byte(rnd.IntN(256))}
				p = netip.PrefixFrom(netip.AddrFrom4(a), rnd.IntN(33)).Masked()
			} else {
				a := netip.MustParseAddr([]string{"::", "fd00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00"}[rnd.IntN(3)]).As16()
				a[15] = byte(rnd.IntN(256))
				p = netip.PrefixFrom(netip.AddrFrom16(a), []int{0, 1, 8, 64, 120, 124, 127, 128}[rnd.IntN(8)]).Masked()
			}
			if !seen[p] {
				seen[p] = true
				prefixes = append(prefixes, verdict.Prefix{Prefix: p, Verdict: verdict.Verdict{Allow: rnd.IntN(2) == 0}})
			}
		}
		table := egress(verdict.Block{Protocol: verdict.TCP, Ports: []verdict.PortRange{{First: 1, Last: 9}}, Peers: verdict.Peers{Anonymous: prefixes}})
		evaluator := verdict.NewEgress(&verdict.Verdicts{Egress: table})
		spans := flatten(prefixes)
		for i, s := range spans {
			if s.last.Less(s.first) || i > 0 && s.first.Is4() == spans[i-1].first.Is4() && !spans[i-1].last.Next().Less(s.first) {
				t.Fatalf("seed %d: %v of %v", seed, spans, prefixes)
			}
		}
		holds := func(a netip.Addr) bool {
			for _, s := range spans {
				if a.BitLen() == s.first.BitLen() && !a.Less(s.first) && !s.last.Less(a) {
					return true
				}
			}
			return false
		}
		var probes []netip.Addr
		for _, p := range prefixes { // every boundary, and one beyond
			f, l := p.Prefix.Addr(), last(p.Prefix)
			probes = append(probes, f, f.Prev(), l, l.Next())
		}
		for _, a := range probes {
			if !a.IsValid() {
				continue
			}
			if want := evaluator.Decide(verdict.TCP, 5, verdict.Peer{Addr: a}).Allowed; holds(a) != want {
				t.Fatalf("seed %d: %s: %v, the evaluator says %v: %v of %v", seed, a, !want, want, spans, prefixes)
			}
		}
	}
}

// route sends a prefix out through eth0.
func route(t *testing.T, prefix, gateway string) {
	t.Helper()
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	d, err := netlink.ParseIPNet(prefix)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: d, Gw: netip.MustParseAddr(gateway).AsSlice()}); err != nil {
		t.Fatal(err)
	}
}
