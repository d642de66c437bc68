package xds

import (
	"strings"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	configrbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	sslv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/ssl/v3"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// RBAC is the network RBAC filter of the mTLS chain: the ingress verdicts on the identity in the TLS session itself, with actions
// named after policy and rule ("shop/db-from-api:ingress[0]").
func RBAC(v *verdict.Verdicts) *corev3.TypedExtensionConfig {
	deny := configrbacv3.RBAC_DENY
	missed := "no policy"
	if n := v.Ingress.Isolating; len(n) > 0 {
		missed = strings.Join(n, ",")
	}
	action := func(name string, a configrbacv3.RBAC_Action) *matcherv3.Matcher_OnMatch {
		return act(extension(name, &configrbacv3.Action{Name: name, Action: a}))
	}
	r := rendering{
		peer:    extension("san", &sslv3.UriSanInput{}),
		address: sourceIP(),
		answer: func(vd verdict.Verdict) (*matcherv3.Matcher_OnMatch, string) {
			reason := v.Ingress.Reasons[vd.Reason]
			name := reason.Policy
			switch {
			case name == "" && vd.Allow:
				name = "not isolated"
			case name == "":
				name = missed
			case reason.Rule != "":
				name += ":" + reason.Rule
			}
			if vd.Allow {
				return action(name, configrbacv3.RBAC_ALLOW), "allow " + name
			}
			return action(name, deny), "deny " + name
		},
		deny: action(missed, deny),
	}
	return &corev3.TypedExtensionConfig{Name: names.RBAC, TypedConfig: pack(&rbacv3.RBAC{StatPrefix: "mantlet", Matcher: matcherOf(r.table(&v.Ingress))})}
}
