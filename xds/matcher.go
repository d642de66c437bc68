package xds

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	corexds "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	networkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

func extension(name string, m proto.Message) *corexds.TypedExtensionConfig {
	return &corexds.TypedExtensionConfig{Name: name, TypedConfig: pack(m)}
}

func then(m *matcherv3.Matcher) *matcherv3.Matcher_OnMatch {
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Matcher{Matcher: m}}
}

// chain is the action that picks a filter chain.
func chain(name string) *matcherv3.Matcher_OnMatch {
	return act(extension(name, wrapperspb.String(name)))
}

func act(a *corexds.TypedExtensionConfig) *matcherv3.Matcher_OnMatch {
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Action{Action: a}}
}

// exact is a hash map over an input. It must not be empty: Envoy refuses that.
func exact(input *corexds.TypedExtensionConfig, m map[string]*matcherv3.Matcher_OnMatch, otherwise *matcherv3.Matcher_OnMatch) *matcherv3.Matcher {
	return &matcherv3.Matcher{
		MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{
			Input:    input,
			TreeType: &matcherv3.Matcher_MatcherTree_ExactMatchMap{ExactMatchMap: &matcherv3.Matcher_MatcherTree_MatchMap{Map: m}},
		}},
		OnNoMatch: otherwise,
	}
}

// route is one entry of a CIDR trie.
type route struct {
	prefix netip.Prefix
	to     *matcherv3.Matcher_OnMatch
	key    string // equal for routes that lead to the same place
}

// trie is a longest-prefix match over an address input. Routes with the same key share one action.
func trie(input *corexds.TypedExtensionConfig, routes []route, otherwise *matcherv3.Matcher_OnMatch) *matcherv3.Matcher {
	m := &matcherv3.IPMatcher{}
	at := map[string]*matcherv3.IPMatcher_IPRangeMatcher{}
	for _, r := range routes {
		rm, ok := at[r.key]
		if !ok {
			rm = &matcherv3.IPMatcher_IPRangeMatcher{OnMatch: r.to}
			at[r.key] = rm
			m.RangeMatchers = append(m.RangeMatchers, rm)
		}
		rm.Ranges = append(rm.Ranges, &corexds.CidrRange{AddressPrefix: r.prefix.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(r.prefix.Bits()))})
	}
	return &matcherv3.Matcher{
		MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{
			Input:    input,
			TreeType: &matcherv3.Matcher_MatcherTree_CustomMatch{CustomMatch: extension("envoy.matching.custom_matchers.trie_matcher", m)},
		}},
		OnNoMatch: otherwise,
	}
}

// rendering says where a verdict matcher looks and what it answers: the same verdicts are rendered for the gate, for the
// outbound listener and for RBAC.
type rendering struct {
	peer    *corexds.TypedExtensionConfig // nil: no peer of this rendering has an identity
	address *corexds.TypedExtensionConfig
	answer  func(verdict.Verdict) (to *matcherv3.Matcher_OnMatch, key string)
	deny    *matcherv3.Matcher_OnMatch
	// plaintext says under which value of the peer input the connections without identity stand; empty: there are none.
	plaintext string
}

// table renders the TCP blocks of a table: port → peer → address.
func (r *rendering) table(t *verdict.Table) *matcherv3.Matcher_OnMatch {
	var fields []*matcherv3.Matcher_MatcherList_FieldMatcher
	for i := range t.Blocks {
		b := &t.Blocks[i]
		if b.Protocol != verdict.TCP {
			continue
		}
		on := r.peers(&b.Peers)
		if len(b.Ports) == 1 && b.Ports[0] == verdict.AllPorts {
			return on
		}
		fields = append(fields, &matcherv3.Matcher_MatcherList_FieldMatcher{Predicate: portIn(b.Ports), OnMatch: on})
	}
	if len(fields) == 0 {
		return r.deny
	}
	return then(&matcherv3.Matcher{
		MatcherType: &matcherv3.Matcher_MatcherList_{MatcherList: &matcherv3.Matcher_MatcherList{Matchers: fields}},
		OnNoMatch:   r.deny,
	})
}

func (r *rendering) peers(p *verdict.Peers) *matcherv3.Matcher_OnMatch {
	if r.peer == nil {
		return r.prefixes(p.Anonymous, r.deny)
	}
	m := make(map[string]*matcherv3.Matcher_OnMatch, len(p.ByIdentity)+1)
	for i := range p.ByIdentity {
		id := &p.ByIdentity[i]
		to, _ := r.answer(id.Verdict)
		if len(id.Addresses) > 0 {
			to = r.prefixes(id.Addresses, to)
		}
		m[id.ID.String()] = to
	}
	if r.plaintext != "" {
		m[r.plaintext] = r.prefixes(p.Anonymous, r.deny)
	}
	otherwise := r.prefixes(p.Identified, r.deny)
	if len(m) == 0 {
		return otherwise
	}
	return then(exact(r.peer, m, otherwise))
}

// prefixes renders a list of prefixes; one that says the same of every address needs no trie.
func (r *rendering) prefixes(ps []verdict.Prefix, otherwise *matcherv3.Matcher_OnMatch) *matcherv3.Matcher_OnMatch {
	if len(ps) == 0 {
		return otherwise
	}
	routes := make([]route, len(ps))
	for i, p := range ps {
		to, key := r.answer(p.Verdict)
		routes[i] = route{p.Prefix, to, key}
	}
	if len(ps) == 2 && ps[0].Prefix.Bits() == 0 && ps[1].Prefix.Bits() == 0 && routes[0].key == routes[1].key {
		return routes[0].to
	}
	return then(trie(r.address, routes, otherwise))
}

// byChain answers with filter chains.
func byChain(allow, deny string) func(verdict.Verdict) (*matcherv3.Matcher_OnMatch, string) {
	return func(v verdict.Verdict) (*matcherv3.Matcher_OnMatch, string) {
		if v.Allow {
			return chain(allow), allow
		}
		return chain(deny), deny
	}
}

// portIn matches a destination port against ranges. Envoy registers no integer range matcher for network inputs, so that ranges
// are a regular expression over the decimal form.
func portIn(ranges []verdict.PortRange) *matcherv3.Matcher_MatcherList_Predicate {
	value := &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: ranges[0].String()}}
	if len(ranges) > 1 || ranges[0].First != ranges[0].Last {
		var alternatives []string
		for _, r := range ranges {
			alternatives = append(alternatives, decimalRange(int(r.First), int(r.Last))...)
		}
		value = &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{
			EngineType: &matcherv3.RegexMatcher_GoogleRe2{GoogleRe2: &matcherv3.RegexMatcher_GoogleRE2{}},
			Regex:      strings.Join(alternatives, "|"),
		}}}
	}
	return &matcherv3.Matcher_MatcherList_Predicate{MatchType: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_{
		SinglePredicate: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate{
			Input:   extension("port", &networkv3.DestinationPortInput{}),
			Matcher: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{ValueMatch: value},
		}}}
}

// decimalRange lists regular expressions that together match the decimal numbers from first to last, both included, and no others.
// It splits the range where a power of ten lets all lower digits run free: 8080–8123 is 80[8-9][0-9], 81[0-1][0-9], 812[0-3].
func decimalRange(first, last int) []string {
	var out []string
	for first <= last {
		power := 1 // that many numbers from first on share all digits but the lower ones, which run free
		for first%(power*10) == 0 && first+power*10-1 <= last && first >= power*10 {
			power *= 10
		}
		digit := first / power % 10
		end := digit
		for end < 9 && first+(end-digit+2)*power-1 <= last {
			end++
		}
		prefix := ""
		if first/power/10 > 0 {
			prefix = strconv.Itoa(first / power / 10)
		}
		free := strings.Repeat("[0-9]", len(strconv.Itoa(power))-1)
		out = append(out, prefix+class(digit, end)+free)
		first += (end - digit + 1) * power
	}
	return out
}

func class(from, to int) string {
	if from == to {
		return fmt.Sprint(from)
	}
	return fmt.Sprintf("[%d-%d]", from, to)
}

var (
	destinationIP   = func() *corexds.TypedExtensionConfig { return extension("dip", &networkv3.DestinationIPInput{}) }
	sourceIP        = func() *corexds.TypedExtensionConfig { return extension("sip", &networkv3.SourceIPInput{}) }
	destinationPort = func() *corexds.TypedExtensionConfig { return extension("port", &networkv3.DestinationPortInput{}) }
	peerID          = func() *corexds.TypedExtensionConfig {
		return extension("peer", &networkv3.FilterStateInput{Key: names.PeerID})
	}
)
