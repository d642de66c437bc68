package xds

import (
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// Gate is the internal listener that decides, at accept, whether a connection reaches the app. Only its matcher varies: an update
// applies in place and drains nothing.
func Gate(v *verdict.Verdicts) *listenerv3.Listener {
	r := rendering{
		peer: peerID(), address: sourceIP(), plaintext: names.Plaintext,
		answer: byChain(names.ChainAllow, names.ChainDeny), deny: chain(names.ChainDeny),
	}
	return &listenerv3.Listener{
		Name:              names.Gate,
		ListenerSpecifier: &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		ListenerFilters:   []*listenerv3.ListenerFilter{originalDst()},
		AccessLog:         accessLog(names.LogGate),
		FilterChains: []*listenerv3.FilterChain{
			{Name: names.ChainAllow, Filters: []*listenerv3.Filter{alone(), onward("gate_allow", names.ClusterApp, names.ChainAllow)}},
			{Name: names.ChainDeny, Filters: []*listenerv3.Filter{tcpProxy("gate_deny", names.ClusterDeny)}},
		},
		FilterChainMatcher: matcherOf(r.table(&v.Ingress)),
	}
}
