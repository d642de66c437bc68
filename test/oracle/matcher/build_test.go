package matcher

import (
	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	networkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	sslv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/ssl/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Short ways to write matchers.

type (
	tree  = matcherv3.Matcher
	on    = *matcherv3.Matcher_OnMatch
	pred  = *matcherv3.Matcher_MatcherList_Predicate
	entry = *matcherv3.Matcher_MatcherList_FieldMatcher
	span  = *matcherv3.IPMatcher_IPRangeMatcher
)

func pack(m proto.Message) *anypb.Any {
	a, err := anypb.New(m)
	if err != nil {
		panic(err)
	}
	return a
}

func extension(m proto.Message) *xdscorev3.TypedExtensionConfig {
	return &xdscorev3.TypedExtensionConfig{Name: "x", TypedConfig: pack(m)}
}

var (
	dstIP     = extension(&networkv3.DestinationIPInput{})
	dstPort   = extension(&networkv3.DestinationPortInput{})
	srcIP     = extension(&networkv3.SourceIPInput{})
	srcPort   = extension(&networkv3.SourcePortInput{})
	sni       = extension(&networkv3.ServerNameInput{})
	transport = extension(&networkv3.TransportProtocolInput{})
	alpn      = extension(&networkv3.ApplicationProtocolInput{})
	peer      = extension(&networkv3.FilterStateInput{Key: "peer"})
	other     = extension(&networkv3.FilterStateInput{Key: "other"})
	unset     = extension(&networkv3.FilterStateInput{Key: "never.set"})
	san       = extension(&sslv3.UriSanInput{})
)

// chain is an action that names a filter chain.
func chain(name string) on {
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Action{Action: extension(wrapperspb.String(name))}}
}

// rule is an RBAC action; a name that starts with "deny" denies.
func rule(name string) on {
	a := &rbacconfigv3.Action{Name: name, Action: rbacconfigv3.RBAC_ALLOW}
	if len(name) >= 4 && name[:4] == "deny" {
		a.Action = rbacconfigv3.RBAC_DENY
	}
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Action{Action: extension(a)}}
}

func nest(m *tree) on {
	return &matcherv3.Matcher_OnMatch{OnMatch: &matcherv3.Matcher_OnMatch_Matcher{Matcher: m}}
}

func keep(o on) on {
	o.KeepMatching = true
	return o
}

func exactly(in *xdscorev3.TypedExtensionConfig, m map[string]on, miss on) *tree {
	return &tree{OnNoMatch: miss, MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{Input: in,
		TreeType: &matcherv3.Matcher_MatcherTree_ExactMatchMap{ExactMatchMap: &matcherv3.Matcher_MatcherTree_MatchMap{Map: m}}}}}
}

func byPrefix(in *xdscorev3.TypedExtensionConfig, m map[string]on, miss on) *tree {
	return &tree{OnNoMatch: miss, MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{Input: in,
		TreeType: &matcherv3.Matcher_MatcherTree_PrefixMatchMap{PrefixMatchMap: &matcherv3.Matcher_MatcherTree_MatchMap{Map: m}}}}}
}

func byRange(in *xdscorev3.TypedExtensionConfig, miss on, spans ...span) *tree {
	return &tree{OnNoMatch: miss, MatcherType: &matcherv3.Matcher_MatcherTree_{MatcherTree: &matcherv3.Matcher_MatcherTree{Input: in,
		TreeType: &matcherv3.Matcher_MatcherTree_CustomMatch{CustomMatch: extension(&matcherv3.IPMatcher{RangeMatchers: spans})}}}}
}

func within(to on, addr string, bits uint32) span {
	return &matcherv3.IPMatcher_IPRangeMatcher{OnMatch: to, Ranges: []*xdscorev3.CidrRange{{AddressPrefix: addr, PrefixLen: wrapperspb.UInt32(bits)}}}
}

func exclusively(s span) span {
	s.Exclusive = true
	return s
}

func list(miss on, entries ...entry) *tree {
	return &tree{OnNoMatch: miss, MatcherType: &matcherv3.Matcher_MatcherList_{MatcherList: &matcherv3.Matcher_MatcherList{Matchers: entries}}}
}

func when(p pred, to on) entry {
	return &matcherv3.Matcher_MatcherList_FieldMatcher{Predicate: p, OnMatch: to}
}

func value(in *xdscorev3.TypedExtensionConfig, s *matcherv3.StringMatcher) pred {
	return &matcherv3.Matcher_MatcherList_Predicate{MatchType: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_{
		SinglePredicate: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate{Input: in,
			Matcher: &matcherv3.Matcher_MatcherList_Predicate_SinglePredicate_ValueMatch{ValueMatch: s}}}}
}

func is(in *xdscorev3.TypedExtensionConfig, text string) pred {
	return value(in, &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: text}})
}

func regex(pattern string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{
		EngineType: &matcherv3.RegexMatcher_GoogleRe2{GoogleRe2: &matcherv3.RegexMatcher_GoogleRE2{}}, Regex: pattern}}}
}

func not(p pred) pred {
	return &matcherv3.Matcher_MatcherList_Predicate{MatchType: &matcherv3.Matcher_MatcherList_Predicate_NotMatcher{NotMatcher: p}}
}

func both(p ...pred) pred {
	return &matcherv3.Matcher_MatcherList_Predicate{MatchType: &matcherv3.Matcher_MatcherList_Predicate_AndMatcher{
		AndMatcher: &matcherv3.Matcher_MatcherList_Predicate_PredicateList{Predicate: p}}}
}

func either(p ...pred) pred {
	return &matcherv3.Matcher_MatcherList_Predicate{MatchType: &matcherv3.Matcher_MatcherList_Predicate_OrMatcher{
		OrMatcher: &matcherv3.Matcher_MatcherList_Predicate_PredicateList{Predicate: p}}}
}
