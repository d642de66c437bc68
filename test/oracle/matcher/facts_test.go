package matcher

import (
	"net/netip"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
)

// from builds a connection from 10.0.0.9 to 10.0.0.1:80 with the peer in filter state; an empty peer leaves it unset.
func from(peer string) Connection {
	c := Connection{SourceIP: netip.MustParseAddr("10.0.0.9"), SourcePort: 4000, DestinationIP: netip.MustParseAddr("10.0.0.1"), DestinationPort: 80}
	if peer != "" {
		c.FilterState = map[string]string{"peer": peer}
	}
	return c
}

func hello(peer, serverName string, protocols ...string) Connection {
	c := from(peer)
	c.TransportProtocol, c.ServerName, c.ApplicationProtocols = "tls", serverName, protocols
	return c
}

// missed is a nested matcher that finds nothing for peer b.
func missed(miss on) on { return nest(exactly(peer, map[string]on{"a": chain("one")}, miss)) }

// facts are what the package documentation claims. Each was true of the real Envoy when it ran last, which the test repeats.
var facts = []struct {
	name string
	m    *tree
	c    Connection
	want string // the chain; "default" is the default filter chain, taken where the matcher says nothing
}{
	{"exact map, hit", exactly(peer, map[string]on{"a": chain("one")}, chain("two")), from("a"), "one"},
	{"exact map, miss", exactly(peer, map[string]on{"a": chain("one")}, chain("two")), from("b"), "two"},
	{"exact map, miss without on_no_match", exactly(peer, map[string]on{"a": chain("one")}, nil), from("b"), "default"},
	{"filter state unset", exactly(peer, map[string]on{"a": chain("one")}, chain("two")), from(""), "two"},
	{"filter state unset, no on_no_match", exactly(peer, map[string]on{"a": chain("one")}, nil), from(""), "default"},
	{"filter state unset, under not", list(nil, when(not(is(unset, "a")), chain("one"))), from(""), "one"},
	{"filter state unset, any pattern", list(chain("two"), when(value(unset, regex(".*")), chain("one"))), from(""), "two"},
	{"filter state unset, in a trie", byRange(peer, chain("two"), within(chain("one"), "0.0.0.0", 0), within(chain("one"), "::", 0)), from(""), "two"},
	{"filter state is no address", byRange(peer, chain("two"), within(chain("one"), "0.0.0.0", 0), within(chain("one"), "::", 0)), from("x"), "two"},
	{"filter state is an IPv4-mapped address", byRange(peer, chain("two"), within(chain("three"), "0.0.0.0", 0), within(chain("one"), "::", 0)), from("::ffff:10.0.0.1"), "one"},
	{"filter state is an address", byRange(peer, chain("two"), within(chain("one"), "::8080", 125)), from("::8087"), "one"},

	{"nested miss under an exact map, outer on_no_match", exactly(dstPort, map[string]on{"80": missed(nil)}, chain("two")), from("b"), "two"},
	{"nested miss under an exact map, none", exactly(dstPort, map[string]on{"80": missed(nil)}, nil), from("b"), "default"},
	{"nested miss under an exact map, inner on_no_match first", exactly(dstPort, map[string]on{"80": missed(chain("three"))}, chain("two")), from("b"), "three"},
	{"nested miss under a trie, outer on_no_match", byRange(dstIP, chain("two"), within(missed(nil), "10.0.0.0", 24)), from("b"), "two"},
	{"nested miss under a trie, none", byRange(dstIP, nil, within(missed(nil), "10.0.0.0", 24)), from("b"), "default"},
	{"nested miss under a trie goes to the next shorter prefix", byRange(dstIP, chain("two"), within(missed(nil), "10.0.0.0", 24), within(chain("three"), "10.0.0.0", 8)), from("b"), "three"},
	{"but not to an exclusive one", byRange(dstIP, chain("two"), within(missed(nil), "10.0.0.0", 24), exclusively(within(chain("three"), "10.0.0.0", 8))), from("b"), "two"},
	{"past an exclusive one to a third", byRange(dstIP, chain("two"), within(missed(nil), "10.0.0.0", 24), exclusively(within(chain("three"), "10.0.0.0", 8)), within(chain("one"), "0.0.0.0", 0)), from("b"), "one"},
	{"exclusive as the longest is tried", byRange(dstIP, nil, exclusively(within(chain("one"), "10.0.0.0", 24)), within(chain("two"), "10.0.0.0", 8)), from("b"), "one"},
	{"exclusive as the longest does not end it", byRange(dstIP, nil, exclusively(within(missed(nil), "10.0.0.0", 24)), within(chain("two"), "10.0.0.0", 8)), from("b"), "two"},
	{"equal prefixes, the first written", byRange(dstIP, nil, within(chain("one"), "10.0.0.0", 24), within(chain("two"), "10.0.0.0", 24)), from("b"), "one"},
	{"equal prefixes, nested miss in the first", byRange(dstIP, nil, within(missed(nil), "10.0.0.0", 24), within(chain("two"), "10.0.0.0", 24)), from("b"), "two"},
	{"longest prefix, not the first written", byRange(dstIP, nil, within(chain("two"), "10.0.0.0", 8), within(chain("one"), "10.0.0.1", 32)), from("b"), "one"},
	{"host bits in a range", byRange(dstIP, nil, within(chain("one"), "10.0.0.77", 24)), from("b"), "one"},
	{"an IPv6 default does not hold IPv4", byRange(dstIP, chain("two"), within(chain("one"), "::", 0)), from("b"), "two"},
	{"nested miss under a list goes to the next entry", list(chain("two"), when(is(dstPort, "80"), missed(nil)), when(is(dstPort, "80"), chain("three"))), from("b"), "three"},
	{"nested miss under a list, outer on_no_match", list(chain("two"), when(is(dstPort, "80"), missed(nil))), from("b"), "two"},
	{"nested miss under a list, none", list(nil, when(is(dstPort, "80"), missed(nil))), from("b"), "default"},
	{"nested miss under a prefix map goes to the shorter one", byPrefix(peer, map[string]on{"b": chain("three"), "bb": missed(nil)}, chain("two")), from("bbb"), "three"},
	{"nested miss in on_no_match is the end", exactly(dstPort, map[string]on{"81": chain("one")}, missed(nil)), from("b"), "default"},
	{"two levels up", exactly(dstPort, map[string]on{"80": nest(byRange(dstIP, nil, within(missed(nil), "10.0.0.0", 8)))}, chain("two")), from("b"), "two"},

	{"a matcher without a kind", &tree{OnNoMatch: chain("one")}, from(""), "one"},
	{"an empty matcher", &tree{}, from(""), "default"},
	{"a regular expression matches the whole", list(chain("two"), when(value(dstPort, regex("8")), chain("one"))), from(""), "two"},
	{"alternatives match the whole too", list(chain("two"), when(value(dstPort, regex("8|80")), chain("one"))), from(""), "one"},

	{"no transport protocol is raw_buffer", exactly(transport, map[string]on{"raw_buffer": chain("one")}, chain("two")), from(""), "one"},
	{"TLS", exactly(transport, map[string]on{"tls": chain("one")}, chain("two")), hello("", "a.example", "mantlet"), "one"},
	{"ALPN in quotes", exactly(alpn, map[string]on{"'mantlet','h2'": chain("one")}, chain("two")), hello("", "a.example", "mantlet", "h2"), "one"},
	{"no ALPN", exactly(alpn, map[string]on{"''": chain("one")}, chain("two")), hello("", "a.example"), "two"},
	{"server name", exactly(sni, map[string]on{"a.example": chain("one")}, chain("two")), hello("", "a.example"), "one"},
	{"no server name", list(nil, when(not(value(sni, regex(".*"))), chain("one"))), hello("", ""), "one"},

	{"an input that is not available ends it all", exactly(dstPort, map[string]on{"80": nest(exactly(san, map[string]on{"a": chain("one")}, chain("three")))}, chain("two")), from("a"), "default"},
	{"the same before a completed handshake", exactly(san, map[string]on{"a": chain("one")}, chain("two")), hello("", "a.example"), "default"},
	{"the same in a predicate", list(chain("two"), when(is(san, "a"), chain("one")), when(is(dstPort, "80"), chain("three"))), from("a"), "default"},
	{"the same under not", list(chain("two"), when(not(is(san, "a")), chain("one"))), from("a"), "default"},
	{"or goes past it", list(chain("two"), when(either(is(san, "a"), is(dstPort, "80")), chain("one"))), from("a"), "one"},
	{"or without another that holds", list(chain("two"), when(either(is(san, "a"), is(dstPort, "81")), chain("one"))), from("a"), "default"},
	{"and stops before it", list(chain("two"), when(both(is(dstPort, "81"), is(san, "a")), chain("one"))), from("a"), "two"},
	{"and comes to it", list(chain("two"), when(both(is(dstPort, "80"), is(san, "a")), chain("one"))), from("a"), "default"},
}

func asListener(dir string, i int, m *tree) *listenerv3.Listener {
	l := listener(dir, i)
	l.FilterChains = []*listenerv3.FilterChain{naming("one"), naming("two"), naming("three")}
	l.DefaultFilterChain = naming("default")
	l.FilterChainMatcher = m
	return l
}

func TestFacts(t *testing.T) {
	for _, fact := range facts {
		l := asListener("/x", 0, fact.m)
		if err := CheckListener(l); err != nil {
			t.Errorf("%s: %v", fact.name, err)
		}
		if got, err := FilterChain(l, fact.c); err != nil || got != fact.want {
			t.Errorf("%s: %q, %v; should be %q", fact.name, got, err, fact.want)
		}
	}
}

func TestFactsHoldOfEnvoy(t *testing.T) {
	dir := t.TempDir()
	var listeners []*listenerv3.Listener
	for i, fact := range facts {
		listeners = append(listeners, asListener(dir, i, fact.m))
	}
	missing := asListener(dir, len(facts), &tree{OnNoMatch: chain("nowhere")})
	noDefault := asListener(dir, len(facts)+1, &tree{})
	noDefault.DefaultFilterChain = nil
	start(t, dir, append(listeners, missing, noDefault))
	for i, fact := range facts {
		if got := chosen(t, listeners[i], fact.c); got != fact.want {
			t.Errorf("%s: envoy chooses %q, should be %q", fact.name, got, fact.want)
		}
	}
	if got := chosen(t, missing, from("")); got != "" {
		t.Errorf("an action that names a missing chain: envoy chooses %q, should close", got)
	}
	if got := chosen(t, noDefault, from("")); got != "" {
		t.Errorf("no match and no default chain: envoy chooses %q, should close", got)
	}
	if got, err := FilterChain(noDefault, from("")); got != "" || err != nil {
		t.Errorf("no match and no default chain: %q, %v", got, err)
	}
	if got, err := FilterChain(missing, from("")); err == nil {
		t.Errorf("an action that names a missing chain: %q without an error", got)
	}
}

func withSANs(sans ...string) Connection {
	c := from("")
	c.TLS = &TLS{URISANs: sans}
	return c
}

// rulings are the facts of the RBAC filter.
var rulings = []struct {
	name string
	rbac *rbacv3.RBAC
	c    Connection
	want Ruling
}{
	{"neither matcher nor rules", &rbacv3.RBAC{}, from(""), Ruling{Allowed: true}},
	{"an empty matcher", &rbacv3.RBAC{Matcher: &tree{}}, from(""), Ruling{}},
	{"no match", &rbacv3.RBAC{Matcher: exactly(dstPort, map[string]on{"81": rule("allow")}, nil)}, from(""), Ruling{}},
	{"allow", &rbacv3.RBAC{Matcher: exactly(dstPort, map[string]on{"80": rule("p")}, nil)}, from(""), Ruling{true, "p"}},
	{"deny", &rbacv3.RBAC{Matcher: exactly(dstPort, map[string]on{"80": rule("deny p")}, rule("p"))}, from(""), Ruling{false, "deny p"}},
	{"by SAN", &rbacv3.RBAC{Matcher: exactly(san, map[string]on{"spiffe://td/a": rule("p")}, rule("deny"))}, withSANs("spiffe://td/a"), Ruling{true, "p"}},
	{"by another SAN", &rbacv3.RBAC{Matcher: exactly(san, map[string]on{"spiffe://td/a": rule("p")}, rule("deny"))}, withSANs("spiffe://td/b"), Ruling{false, "deny"}},
	{"two SANs are one string", &rbacv3.RBAC{Matcher: exactly(san, map[string]on{"spiffe://td/a,spiffe://td/b": rule("p")}, rule("deny"))}, withSANs("spiffe://td/a", "spiffe://td/b"), Ruling{true, "p"}},
	{"a certificate without a SAN", &rbacv3.RBAC{Matcher: exactly(san, map[string]on{"spiffe://td/a": rule("deny")}, rule("p"))}, withSANs(), Ruling{true, "p"}},
	{"SAN of plaintext", &rbacv3.RBAC{Matcher: exactly(dstPort, map[string]on{"80": nest(exactly(san, map[string]on{"a": rule("p")}, rule("inner")))}, rule("outer"))}, from(""), Ruling{}},
	{"filter state", &rbacv3.RBAC{Matcher: exactly(peer, map[string]on{"a": rule("p")}, nil)}, from("a"), Ruling{true, "p"}},
	{"nested miss in a trie", &rbacv3.RBAC{Matcher: byRange(srcIP, rule("deny"), within(nest(exactly(peer, map[string]on{"a": rule("deny")}, nil)), "10.0.0.0", 24), within(rule("p"), "10.0.0.0", 8))}, from("b"), Ruling{true, "p"}},
}

func asECDS(r *rbacv3.RBAC) *corev3.TypedExtensionConfig {
	r.StatPrefix = "x"
	return &corev3.TypedExtensionConfig{Name: "rbac", TypedConfig: pack(r)}
}

func TestRulings(t *testing.T) {
	for _, r := range rulings {
		ext := asECDS(r.rbac)
		if err := CheckRBAC(ext); err != nil {
			t.Errorf("%s: %v", r.name, err)
		}
		if got, err := RBAC(ext, r.c); err != nil || got != r.want {
			t.Errorf("%s: %+v, %v; should be %+v", r.name, got, err, r.want)
		}
	}
}

func TestRulingsHoldOfEnvoy(t *testing.T) {
	dir := t.TempDir()
	pki := newPKI(t)
	pki.leaf(t, []string{"spiffe://td/server"})
	var listeners []*listenerv3.Listener
	for i, r := range rulings {
		asECDS(r.rbac)
		l := listener(dir, i)
		l.ListenerFilters = l.ListenerFilters[:2] // one byte is not enough for the inspector
		if r.c.TLS != nil {
			l.FilterChains = []*listenerv3.FilterChain{guarded(r.rbac, pki)}
		} else {
			l.FilterChains = []*listenerv3.FilterChain{guarded(r.rbac, nil)}
		}
		listeners = append(listeners, l)
	}
	start(t, dir, listeners)
	for i, r := range rulings {
		if got := admitted(t, listeners[i], r.c, pki); got != r.want.Allowed {
			t.Errorf("%s: envoy admits: %t, should be %t", r.name, got, r.want.Allowed)
		}
	}
}
