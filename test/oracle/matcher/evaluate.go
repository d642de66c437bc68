package matcher

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Action is what a match says to do.
type Action struct {
	Name   string // the extension's name, which Envoy ignores
	Config proto.Message
}

// Chain returns the filter chain that the action of a filter_chain_matcher names.
func (a *Action) Chain() (string, error) {
	s, ok := a.Config.(*wrapperspb.StringValue)
	if !ok {
		return "", fmt.Errorf("action %q is a %s, where a filter chain matcher takes a google.protobuf.StringValue", a.Name, a.Config.ProtoReflect().Descriptor().FullName())
	}
	return s.GetValue(), nil
}

// RBAC returns the action of an RBAC matcher.
func (a *Action) RBAC() (*rbacconfigv3.Action, error) {
	r, ok := a.Config.(*rbacconfigv3.Action)
	if !ok {
		return nil, fmt.Errorf("action %q is a %s, where an RBAC matcher takes an envoy.config.rbac.v3.Action", a.Name, a.Config.ProtoReflect().Descriptor().FullName())
	}
	return r, nil
}

// Evaluate returns what a matcher says of a connection; nil where it says nothing, and that is also where an input is not available.
// It fails on whatever it does not know. It looks only at what the connection comes past: see CheckListener and CheckRBAC.
func Evaluate(m *matcherv3.Matcher, c Connection) (*Action, error) {
	out, err := match(m, c)
	return out.action, err
}

// errKeepMatching is about a field that Envoy 1.40.0 refuses in RBAC, and accepts in filter_chain_matcher only to crash at the first
// connection.
var errKeepMatching = errors.New("keep_matching is set: envoy refuses it in RBAC, and crashes by it in filter_chain_matcher")

// outcome is one of three: an action; none; or, where aborted is set, that the question could not be put. An abort goes all the way
// up: nobody's on_no_match is asked.
type outcome struct {
	action  *Action
	aborted bool
}

// final reports whether no further candidate is looked at.
func (o outcome) final() bool { return o.action != nil || o.aborted }

func match(m *matcherv3.Matcher, c Connection) (outcome, error) {
	var out outcome
	var err error
	switch kind := m.GetMatcherType().(type) {
	case nil: // a matcher without a kind is its on_no_match
	case *matcherv3.Matcher_MatcherList_:
		out, err = matchList(kind.MatcherList, c)
	case *matcherv3.Matcher_MatcherTree_:
		out, err = matchTree(kind.MatcherTree, c)
	default:
		err = fmt.Errorf("matcher type %T is unknown here", kind)
	}
	if err != nil || out.final() {
		return out, err
	}
	return follow(m.GetOnNoMatch(), c)
}

// follow resolves what hangs on a match: an action, or a matcher that may find nothing.
func follow(on *matcherv3.Matcher_OnMatch, c Connection) (out outcome, err error) {
	if on.GetKeepMatching() {
		return outcome{}, errKeepMatching
	}
	switch kind := on.GetOnMatch().(type) {
	case nil:
		if on != nil {
			return outcome{}, fmt.Errorf("an on_match has neither matcher nor action")
		}
	case *matcherv3.Matcher_OnMatch_Action:
		out.action, err = action(kind.Action)
	case *matcherv3.Matcher_OnMatch_Matcher:
		out, err = match(kind.Matcher, c)
	default:
		err = fmt.Errorf("on_match type %T is unknown here", kind)
	}
	return out, err
}

func action(ext *corev3.TypedExtensionConfig) (*Action, error) {
	config, err := ext.GetTypedConfig().UnmarshalNew()
	if err != nil {
		return nil, fmt.Errorf("action %q: %w", ext.GetName(), err)
	}
	switch a := config.(type) {
	case *wrapperspb.StringValue:
		return &Action{Name: ext.GetName(), Config: a}, nil
	case *rbacconfigv3.Action:
		if err := a.ValidateAll(); err != nil {
			return nil, fmt.Errorf("action %q: envoy refuses it: %w", ext.GetName(), err)
		}
		return &Action{Name: ext.GetName(), Config: a}, nil
	}
	return nil, fmt.Errorf("action %q: type %s is unknown here", ext.GetName(), ext.GetTypedConfig().GetTypeUrl())
}

// matchList takes the first entry whose predicate holds and whose on_match yields something.
func matchList(list *matcherv3.Matcher_MatcherList, c Connection) (outcome, error) {
	for _, entry := range list.GetMatchers() {
		held, err := holds(entry.GetPredicate(), c)
		if err != nil || held == unavailable {
			return outcome{aborted: true}, err
		}
		if held == no {
			continue
		}
		if out, err := follow(entry.GetOnMatch(), c); err != nil || out.final() {
			return out, err
		}
	}
	return outcome{}, nil
}

func matchTree(tree *matcherv3.Matcher_MatcherTree, c Connection) (outcome, error) {
	value, err := input(tree.GetInput(), c)
	if err != nil || !value.available {
		return outcome{aborted: true}, err
	}
	var candidates []*matcherv3.Matcher_OnMatch
	switch kind := tree.GetTreeType().(type) {
	case *matcherv3.Matcher_MatcherTree_ExactMatchMap:
		if on, ok := kind.ExactMatchMap.GetMap()[value.text]; ok && value.present {
			candidates = append(candidates, on)
		}
	case *matcherv3.Matcher_MatcherTree_PrefixMatchMap:
		candidates = prefixes(kind.PrefixMatchMap.GetMap(), value)
	case *matcherv3.Matcher_MatcherTree_CustomMatch:
		candidates, err = ranges(kind.CustomMatch, value)
	default:
		err = fmt.Errorf("tree type %T is unknown here", kind)
	}
	if err != nil {
		return outcome{}, err
	}
	for _, on := range candidates {
		if out, err := follow(on, c); err != nil || out.final() {
			return out, err
		}
	}
	return outcome{}, nil
}

// prefixes returns the entries whose key the value starts with, the longest first.
func prefixes(m map[string]*matcherv3.Matcher_OnMatch, value inputValue) []*matcherv3.Matcher_OnMatch {
	var keys []string
	for k := range m {
		if value.present && strings.HasPrefix(value.text, k) {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(a, b string) int { return len(b) - len(a) })
	var list []*matcherv3.Matcher_OnMatch
	for _, k := range keys {
		list = append(list, m[k])
	}
	return list
}

// ranges returns the entries of an IP matcher that hold the address: the longest prefix first, equal ones in the order written. An
// exclusive one counts only in the first place.
func ranges(ext *corev3.TypedExtensionConfig, value inputValue) ([]*matcherv3.Matcher_OnMatch, error) {
	config, err := ext.GetTypedConfig().UnmarshalNew()
	if err != nil {
		return nil, fmt.Errorf("custom matcher %q: %w", ext.GetName(), err)
	}
	ip, ok := config.(*matcherv3.IPMatcher)
	if !ok {
		return nil, fmt.Errorf("custom matcher %q: type %s is unknown here", ext.GetName(), ext.GetTypedConfig().GetTypeUrl())
	}
	if err := ip.ValidateAll(); err != nil {
		return nil, fmt.Errorf("envoy refuses this IP matcher: %w", err)
	}
	addr, err := netip.ParseAddr(value.text)
	isAddress := value.present && err == nil
	if isAddress && addr.Zone() != "" {
		return nil, fmt.Errorf("custom matcher %q: what Envoy makes of %s, an address with a zone, is unknown here", ext.GetName(), addr)
	}
	type hit struct {
		bits      int
		exclusive bool
		on        *matcherv3.Matcher_OnMatch
	}
	var hits []hit
	for _, m := range ip.GetRangeMatchers() {
		for _, r := range m.GetRanges() {
			prefix, err := cidr(r)
			if err != nil {
				return nil, err
			}
			if isAddress && prefix.Contains(addr) {
				hits = append(hits, hit{prefix.Bits(), m.GetExclusive(), m.GetOnMatch()})
			}
		}
	}
	slices.SortStableFunc(hits, func(a, b hit) int { return cmp.Compare(b.bits, a.bits) })
	var list []*matcherv3.Matcher_OnMatch
	for i, h := range hits {
		if i == 0 || !h.exclusive {
			list = append(list, h.on)
		}
	}
	return list, nil
}

// cidr reads a range as strictly as our own configuration should be written; Envoy takes a missing length for 0 and cuts a too long
// one off.
func cidr(r *corev3.CidrRange) (netip.Prefix, error) {
	addr, err := netip.ParseAddr(r.GetAddressPrefix())
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("range %q: %w", r.GetAddressPrefix(), err)
	}
	if r.GetPrefixLen() == nil || int(r.GetPrefixLen().GetValue()) > addr.BitLen() {
		return netip.Prefix{}, fmt.Errorf("range %s: no prefix length, or one over %d", addr, addr.BitLen())
	}
	return netip.PrefixFrom(addr, int(r.GetPrefixLen().GetValue())), nil
}
