package matcher

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	"google.golang.org/protobuf/encoding/prototext"
)

// random makes matchers and connections from alphabets so small that they meet.
type random struct {
	*rand.Rand
	inputs []question
	leaf   func(i int) on
}

// question is an input with texts that it may say.
type question struct {
	input *xdscorev3.TypedExtensionConfig
	texts []string
}

var (
	addresses = []string{"10.0.0.1", "10.0.0.2", "10.0.1.1", "fd00::1", "fd00::2"}
	spans     = []string{"0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/24", "10.0.0.1/32", "10.0.1.0/24", "::/0", "fd00::/64", "fd00::1/128"}
	states    = []string{"a", "ab", "abc", "b", "10.0.0.1", "fd00::2", "plaintext"}
	sans      = []string{"spiffe://td/a", "spiffe://td/b"}
	network   = []question{
		{dstIP, addresses}, {srcIP, addresses}, {dstPort, []string{"80", "81", "8080"}}, {srcPort, []string{"4000", "4001"}}, {peer, states}, {other, states},
		{sni, []string{"a.example", "b.example"}}, {unset, states},
	}
	forChains = append([]question{{transport, []string{"tls", "raw_buffer"}}, {alpn, []string{"'a'", "'a','b'"}}}, network...)
	forRBAC   = append([]question{{san, append(sans, "spiffe://td/a,spiffe://td/b")}}, network...)
)

func choose[T any](r random, from []T) T { return from[r.IntN(len(from))] }

func (r random) tree(depth int) *tree {
	q := choose(r, r.inputs)
	var miss on
	if r.IntN(2) == 0 {
		miss = r.on(depth)
	}
	switch r.IntN(4) {
	case 0:
		return exactly(q.input, r.children(q, depth), miss)
	case 1:
		return byPrefix(q.input, r.children(q, depth), miss)
	case 2:
		q = choose(r, []question{{dstIP, nil}, {srcIP, nil}, {peer, nil}})
		var list []span
		for range 1 + r.IntN(4) {
			p := netip.MustParsePrefix(choose(r, spans))
			s := within(r.on(depth), p.Addr().String(), uint32(p.Bits()))
			s.Exclusive = r.IntN(4) == 0
			if r.IntN(4) == 0 {
				p := netip.MustParsePrefix(choose(r, spans))
				s.Ranges = append(s.Ranges, within(nil, p.Addr().String(), uint32(p.Bits())).Ranges...)
			}
			list = append(list, s)
		}
		return byRange(q.input, miss, list...)
	}
	var entries []entry
	for range 1 + r.IntN(3) {
		entries = append(entries, when(r.predicate(2), r.on(depth)))
	}
	return list(miss, entries...)
}

func (r random) on(depth int) on {
	if depth > 0 && r.IntN(3) > 0 {
		return nest(r.tree(depth - 1))
	}
	return r.leaf(r.IntN(3))
}

func (r random) children(q question, depth int) map[string]on {
	m := map[string]on{}
	for range 1 + r.IntN(3) {
		text := choose(r, q.texts)
		m[text[:len(text)-r.IntN(2)]] = r.on(depth) // sometimes cut short, for prefixes
	}
	return m
}

func (r random) predicate(depth int) pred {
	if depth > 0 {
		switch r.IntN(6) {
		case 0:
			return not(r.predicate(depth - 1))
		case 1:
			return both(r.predicate(depth-1), r.predicate(depth-1))
		case 2:
			return either(r.predicate(depth-1), r.predicate(depth-1))
		}
	}
	q := choose(r, r.inputs)
	text := choose(r, q.texts)
	half := len(text) / 2
	s := choose(r, []*matcherv3.StringMatcher{
		{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: text}},
		{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: text[:half+1]}},
		{MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: text[half:]}},
		{MatchPattern: &matcherv3.StringMatcher_Contains{Contains: text[half:]}},
		{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: text}, IgnoreCase: true},
		regex("[0-9]+"), regex("a.*|80"), regex(".*"),
	})
	return value(q.input, s)
}

func (r random) connection() Connection {
	i, j := r.IntN(3), r.IntN(3)
	if r.IntN(3) == 0 {
		i, j = 3+r.IntN(2), 3+r.IntN(2)
	}
	c := Connection{SourceIP: netip.MustParseAddr(addresses[i]), DestinationIP: netip.MustParseAddr(addresses[j]),
		SourcePort: 4000 + uint16(r.IntN(2)), DestinationPort: choose(r, []uint16{80, 81, 8080}), FilterState: map[string]string{}}
	if r.IntN(4) > 0 {
		c.FilterState["peer"] = choose(r, states)
	}
	if r.IntN(4) > 0 {
		c.FilterState["other"] = choose(r, states)
	}
	return c
}

// TestRandomFilterChains asks the interpreter and the real Envoy the same.
func TestRandomFilterChains(t *testing.T) {
	const matchers, connections = 200, 12
	dir := t.TempDir()
	r := random{Rand: rand.New(rand.NewPCG(1, 1)), inputs: forChains, leaf: func(i int) on { return chain([]string{"one", "two", "three"}[i]) }}
	var listeners []*listenerv3.Listener
	for i := range matchers {
		if i == matchers/2 { // the second half comes across an input that is never available here
			r.inputs = append([]question{{san, sans}}, forChains...)
		}
		l := asListener(dir, i, r.tree(3))
		if err := CheckListener(l); err != nil {
			t.Fatalf("matcher %d: %v", i, err)
		}
		listeners = append(listeners, l)
	}
	start(t, dir, listeners)
	answers := map[string]int{}
	for i, l := range listeners {
		for range connections {
			c := r.connection()
			if r.IntN(3) == 0 {
				c.TransportProtocol, c.ServerName = "tls", choose(r, []string{"", "a.example", "b.example"})
				c.ApplicationProtocols = choose(r, [][]string{nil, {"a"}, {"a", "b"}})
			}
			want, err := FilterChain(l, c)
			if err != nil {
				t.Fatalf("matcher %d: %v", i, err)
			}
			answers[want]++
			if got := chosen(t, l, c); got != want {
				t.Fatalf("matcher %d: envoy chooses %q and the interpreter %q for %+v by\n%s", i, got, want, c, prototext.Format(l.GetFilterChainMatcher()))
			}
		}
	}
	spread(t, answers, 4)
}

// TestRandomRulings does the same for RBAC, half of it behind mTLS.
func TestRandomRulings(t *testing.T) {
	const matchers, connections = 120, 12
	dir := t.TempDir()
	pki := newPKI(t)
	pki.leaf(t, []string{"spiffe://td/server"})
	r := random{Rand: rand.New(rand.NewPCG(2, 2)), inputs: forRBAC, leaf: func(i int) on { return rule([]string{"p", "q", "deny"}[i]) }}
	var listeners []*listenerv3.Listener
	var rbacs []*rbacv3.RBAC
	for i := range matchers {
		rbac := &rbacv3.RBAC{Matcher: r.tree(3)}
		if err := CheckRBAC(asECDS(rbac)); err != nil {
			t.Fatalf("matcher %d: %v", i, err)
		}
		rbacs = append(rbacs, rbac)
		l := listener(dir, i)
		l.ListenerFilters = l.ListenerFilters[:2] // without the inspector there is no server name either
		l.FilterChains = []*listenerv3.FilterChain{guarded(rbac, choosePKI(i, pki))}
		listeners = append(listeners, l)
	}
	start(t, dir, listeners)
	answers := map[string]int{}
	for i, l := range listeners {
		for range connections {
			c := r.connection()
			if choosePKI(i, pki) != nil {
				c.TLS = &TLS{URISANs: choose(r, [][]string{nil, sans[:1], sans[1:], sans})}
			}
			want, err := RBAC(asECDS(rbacs[i]), c)
			if err != nil {
				t.Fatalf("matcher %d: %v", i, err)
			}
			answers[fmt.Sprintf("%+v", want)]++
			if got := admitted(t, l, c, pki); got != want.Allowed {
				t.Fatalf("matcher %d: envoy admits: %t, the interpreter rules %+v for %+v by\n%s", i, got, want, c, prototext.Format(rbacs[i]))
			}
		}
	}
	spread(t, answers, 4)
}

// choosePKI is every other listener's.
func choosePKI(i int, p *pki) *pki {
	if i%2 == 0 {
		return nil
	}
	return p
}

// spread fails where the cases did not come to enough different answers to mean anything.
func spread(t *testing.T, answers map[string]int, kinds int) {
	t.Helper()
	t.Log(answers)
	frequent := 0
	for _, n := range answers {
		if n >= 50 {
			frequent++
		}
	}
	if frequent < kinds {
		t.Errorf("only %d answers came up 50 times: %v", frequent, answers)
	}
}
