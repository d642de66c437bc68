package matcher

import (
	"fmt"
	"slices"

	xdscorev3 "github.com/cncf/xds/go/xds/core/v3"
	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	"google.golang.org/protobuf/proto"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
)

// CheckListener fails where Envoy would refuse the listener for its matcher, where a matcher names a filter chain that is not there,
// and where the interpreter would have to guess. FilterChain looks only at what a connection comes past; this looks at everything.
func CheckListener(l *listenerv3.Listener) error {
	if err := l.ValidateAll(); err != nil {
		return fmt.Errorf("listener %s: envoy refuses it: %w", l.GetName(), err)
	}
	v := visitor{
		action: func(a *Action) error {
			name, err := a.Chain()
			if err == nil && !slices.ContainsFunc(l.GetFilterChains(), func(fc *listenerv3.FilterChain) bool { return fc.GetName() == name }) {
				err = fmt.Errorf("an action names filter chain %q, which is not there", name)
			}
			return err
		},
	}
	if err := v.matcher(l.GetFilterChainMatcher()); err != nil {
		return fmt.Errorf("listener %s: %w", l.GetName(), err)
	}
	return nil
}

// notInRBAC are the inputs that the network RBAC filter refuses.
var notInRBAC = []string{
	"type.googleapis.com/envoy.extensions.matching.common_inputs.network.v3.TransportProtocolInput",
	"type.googleapis.com/envoy.extensions.matching.common_inputs.network.v3.ApplicationProtocolInput",
}

// CheckRBAC is for RBAC what CheckListener is for FilterChain.
func CheckRBAC(ext *corev3.TypedExtensionConfig) error {
	config := &rbacv3.RBAC{}
	if err := ext.GetTypedConfig().UnmarshalTo(config); err != nil {
		return fmt.Errorf("RBAC %s: %w", ext.GetName(), err)
	}
	if err := config.ValidateAll(); err != nil {
		return fmt.Errorf("RBAC %s: envoy refuses it: %w", ext.GetName(), err)
	}
	v := visitor{
		action: func(a *Action) error { _, err := a.RBAC(); return err },
		input: func(url string) error {
			if slices.Contains(notInRBAC, url) {
				return fmt.Errorf("envoy refuses %s in an RBAC matcher", url)
			}
			return nil
		},
	}
	for _, m := range []*matcherv3.Matcher{config.GetMatcher(), config.GetShadowMatcher()} {
		if err := v.matcher(m); err != nil {
			return fmt.Errorf("RBAC %s: %w", ext.GetName(), err)
		}
	}
	return nil
}

// visitor walks all of a matcher. Its functions may be nil.
type visitor struct {
	action func(*Action) error
	input  func(typeURL string) error
}

func (v visitor) matcher(m *matcherv3.Matcher) error {
	if m == nil {
		return nil
	}
	for _, entry := range m.GetMatcherList().GetMatchers() {
		if err := v.predicate(entry.GetPredicate()); err != nil {
			return err
		}
		if err := v.onMatch(entry.GetOnMatch()); err != nil {
			return err
		}
	}
	if tree := m.GetMatcherTree(); tree != nil {
		if err := v.tree(tree); err != nil {
			return err
		}
	}
	if m.GetOnNoMatch() == nil {
		return nil
	}
	return v.onMatch(m.GetOnNoMatch())
}

func (v visitor) tree(tree *matcherv3.Matcher_MatcherTree) error {
	if err := v.knows(tree.GetInput()); err != nil {
		return err
	}
	if custom := tree.GetCustomMatch(); custom != nil {
		if _, err := ranges(custom, inputValue{}); err != nil { // reads every range
			return err
		}
		ip := &matcherv3.IPMatcher{}
		if err := proto.Unmarshal(custom.GetTypedConfig().GetValue(), ip); err != nil {
			return err
		}
		for _, m := range ip.GetRangeMatchers() {
			if err := v.onMatch(m.GetOnMatch()); err != nil {
				return err
			}
		}
	}
	for _, m := range []*matcherv3.Matcher_MatcherTree_MatchMap{tree.GetExactMatchMap(), tree.GetPrefixMatchMap()} {
		for key, on := range m.GetMap() {
			if err := v.onMatch(on); err != nil {
				return fmt.Errorf("under %q: %w", key, err)
			}
		}
	}
	return nil
}

func (v visitor) onMatch(on *matcherv3.Matcher_OnMatch) error {
	switch {
	case on.GetKeepMatching():
		return errKeepMatching
	case on.GetMatcher() != nil:
		return v.matcher(on.GetMatcher())
	case on.GetAction() == nil:
		return fmt.Errorf("an on_match has neither matcher nor action")
	}
	a, err := action(on.GetAction())
	if err == nil && v.action != nil {
		err = v.action(a)
	}
	return err
}

func (v visitor) predicate(p *matcherv3.Matcher_MatcherList_Predicate) error {
	if s := p.GetSinglePredicate(); s != nil {
		if s.GetValueMatch() == nil {
			return fmt.Errorf("predicate matcher type %T is unknown here", s.GetMatcher())
		}
		if _, err := matchString(s.GetValueMatch(), ""); err != nil {
			return err
		}
		return v.knows(s.GetInput())
	}
	parts := slices.Concat(p.GetAndMatcher().GetPredicate(), p.GetOrMatcher().GetPredicate())
	if n := p.GetNotMatcher(); n != nil {
		parts = append(parts, n)
	}
	for _, part := range parts {
		if err := v.predicate(part); err != nil {
			return err
		}
	}
	return nil
}

// knows fails on an input that the interpreter does not know or that has no place here.
func (v visitor) knows(ext *xdscorev3.TypedExtensionConfig) error {
	if _, err := input(ext, anyConnection); err != nil {
		return err
	}
	if v.input == nil {
		return nil
	}
	return v.input(ext.GetTypedConfig().GetTypeUrl())
}
