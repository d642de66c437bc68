package matcher

import (
	"fmt"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbacconfigv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
)

// FilterChain returns the name of the filter chain that a listener chooses for a connection. Where there is none, Envoy closes the
// connection and the name is empty. It fails where an action names a chain that the listener does not have; Envoy then closes the
// connection too, but nobody means that.
func FilterChain(l *listenerv3.Listener, c Connection) (string, error) {
	if l.GetFilterChainMatcher() == nil {
		return legacyChain(l, c)
	}
	action, err := Evaluate(l.GetFilterChainMatcher(), c)
	if err != nil {
		return "", fmt.Errorf("listener %s: %w", l.GetName(), err)
	}
	if action == nil {
		return l.GetDefaultFilterChain().GetName(), nil
	}
	name, err := action.Chain()
	if err != nil {
		return "", fmt.Errorf("listener %s: %w", l.GetName(), err)
	}
	if !slices.ContainsFunc(l.GetFilterChains(), func(fc *listenerv3.FilterChain) bool { return fc.GetName() == name }) {
		return "", fmt.Errorf("listener %s: the matcher names filter chain %q, which is not there", l.GetName(), name)
	}
	return name, nil
}

// Ruling is what an RBAC filter decides.
type Ruling struct {
	Allowed bool
	Name    string // of the action; empty where no action decided
}

// RBAC returns the ruling of a network RBAC filter, as ECDS carries it. A filter with neither matcher nor rules allows everything; a
// matcher that yields nothing denies. Rules, which Envoy reads only where there is no matcher, are not known here.
func RBAC(ext *corev3.TypedExtensionConfig, c Connection) (Ruling, error) {
	config := &rbacv3.RBAC{}
	if err := ext.GetTypedConfig().UnmarshalTo(config); err != nil {
		return Ruling{}, fmt.Errorf("RBAC %s: %w", ext.GetName(), err)
	}
	if config.GetMatcher() == nil {
		if config.GetRules() != nil {
			return Ruling{}, fmt.Errorf("RBAC %s: rules instead of a matcher are unknown here", ext.GetName())
		}
		return Ruling{Allowed: true}, nil
	}
	action, err := Evaluate(config.GetMatcher(), c)
	if err != nil {
		return Ruling{}, fmt.Errorf("RBAC %s: %w", ext.GetName(), err)
	}
	if action == nil {
		return Ruling{}, nil
	}
	a, err := action.RBAC()
	if err != nil {
		return Ruling{}, fmt.Errorf("RBAC %s: %w", ext.GetName(), err)
	}
	switch a.GetAction() {
	case rbacconfigv3.RBAC_ALLOW:
		return Ruling{Allowed: true, Name: a.GetName()}, nil
	case rbacconfigv3.RBAC_DENY:
		return Ruling{Name: a.GetName()}, nil
	}
	return Ruling{}, fmt.Errorf("RBAC %s: action %s of %q is unknown here", ext.GetName(), a.GetAction(), a.GetName())
}
