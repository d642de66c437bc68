package xds

import (
	"net/netip"
	"strconv"
	"time"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	filterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	originaldstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	tlsinspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	setfilterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	tcpproxyv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	networkv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// sniffTimeout bounds the wait for a ClientHello. A client that has said nothing by then counts as plaintext: clients of
// server-first plaintext protocols wait this long for the banner. A sidecar that is slower than this is taken for plaintext and
// refused, so that it must outlast the handshake queue of a busy machine.
const sniffTimeout = 3 * time.Second

// handshakeTimeout bounds a TLS handshake from its ClientHello on: without it, whoever says nothing more keeps a connection open for ever.
// The sidecar at the other end gives up at the same time.
const handshakeTimeout = connectTimeout

// earlyData is how much of a connection Envoy holds until the TLS handshake is done and the next hop is connected.
const earlyData = 8192

// Inbound captures what arrives at the pod and tells apart mTLS, plaintext and the own node. It depends on nothing but the
// addresses of the pod's node and on a setting of the whole cluster.
func Inbound(node []netip.Addr, sessions Resumption) *listenerv3.Listener {
	toPlainOrNode := chain(names.ChainPlain)
	if len(node) > 0 {
		var routes []route
		for _, a := range node {
			routes = append(routes, route{netip.PrefixFrom(a, a.BitLen()), chain(names.ChainNode), names.ChainNode})
		}
		toPlainOrNode = then(trie(sourceIP(), routes, chain(names.ChainPlain)))
	}
	// The ALPN input writes the list of protocols quoted and joined by commas; a sidecar offers this one and no other.
	alpn := exact(extension("alpn", &networkv3.ApplicationProtocolInput{}),
		map[string]*matcherv3.Matcher_OnMatch{"'" + names.ALPN + "'": chain(names.ChainMTLS)}, toPlainOrNode)
	transport := exact(extension("transport", &networkv3.TransportProtocolInput{}),
		map[string]*matcherv3.Matcher_OnMatch{"tls": then(alpn)}, toPlainOrNode)
	capture := exact(destinationPort(), map[string]*matcherv3.Matcher_OnMatch{
		strconv.Itoa(names.OutboundPort): chain(names.ChainBlackhole),
		strconv.Itoa(names.InboundPort):  chain(names.ChainBlackhole),
	}, then(transport))

	l := capturing(names.Inbound, names.InboundPort)
	l.TrafficDirection = corev3.TrafficDirection_INBOUND
	l.ListenerFilters = []*listenerv3.ListenerFilter{originalDst(), listenerFilter("tls_inspector", &tlsinspectorv3.TlsInspector{})}
	l.ListenerFiltersTimeout = durationpb.New(sniffTimeout)
	l.ContinueOnListenerFiltersTimeout = true
	l.AccessLog = accessLog(names.LogInbound)
	l.FilterChainMatcher = capture
	l.FilterChains = []*listenerv3.FilterChain{
		{Name: names.ChainBlackhole, Filters: []*listenerv3.Filter{tcpProxy("blackhole", names.ClusterDeny)}},
		{Name: names.ChainMTLS, TransportSocket: downstreamTLS(sessions), TransportSocketConnectTimeout: durationpb.New(handshakeTimeout), Filters: []*listenerv3.Filter{rbacFilter(), mtlsState(), toGateAfterHandshake()}},
		{Name: names.ChainNode, Filters: []*listenerv3.Filter{alone(), onward("node", names.ClusterApp, names.ChainNode)}},
		{Name: names.ChainPlain, Filters: []*listenerv3.Filter{plainState(), tcpProxy("plain", names.ClusterToGate)}},
	}
	return l
}

// Outbound captures what the app sends. Inside the cluster networks, at external addresses of services with their ports, at host ports of the own node, and
// at ports of the range of node ports wherever they are, each destination is a cluster on demand; for all else outside the egress verdicts by address decide
// at accept.
//
// External addresses are known here, with their ports, because no range tells them from others: whoever comes to have one, or ceases to, is an update for
// every sidecar. At other ports such an address is what it would be otherwise. Host ports are known in the same way, on their own node.
//
// Which addresses are nodes', and which of their ports are services', the control plane knows when it is asked. So no sidecar is told when a node or a
// node port comes or goes but those that use it; the price is that a connection to such a port outside the cluster asks too.
func Outbound(v *verdict.Verdicts, n *verdict.Network) *listenerv3.Listener {
	balanced := func(otherwise *matcherv3.Matcher_OnMatch) *matcherv3.Matcher_OnMatch {
		return nodePorts(n.NodePortRange(), otherwise)
	}
	r := rendering{
		address: destinationIP(),
		answer:  byChain(names.ChainPassthrough, names.ChainDeny), deny: chain(names.ChainDeny),
	}
	// Loopback is never captured: a connection that says it goes there was made to this listener's own port.
	routes := []route{
		{netip.MustParsePrefix("127.0.0.0/8"), chain(names.ChainBlackhole), names.ChainBlackhole},
		{netip.MustParsePrefix("::1/128"), chain(names.ChainBlackhole), names.ChainBlackhole},
	}
	for _, p := range n.Cluster {
		routes = append(routes, route{p, chain(names.ChainMesh), names.ChainMesh})
	}
	for _, a := range n.Node {
		routes = append(routes, route{netip.PrefixFrom(a, a.BitLen()), balanced(chain(names.ChainNode)), names.ChainNode})
	}
	l := capturing(names.Outbound, names.OutboundPort)
	l.TrafficDirection = corev3.TrafficDirection_OUTBOUND
	l.ListenerFilters = []*listenerv3.ListenerFilter{originalDst()}
	l.AccessLog = accessLog(names.LogOutbound, ofDestination()...)
	// A connection to the capture port itself would come back to it when passed on, whichever of the pod's addresses it was made to,
	// and again, for ever. The price: port 15001 of the outside cannot be reached.
	ports := asked(n)
	ports[strconv.Itoa(names.OutboundPort)] = chain(names.ChainBlackhole)
	l.FilterChainMatcher = exact(destinationPort(), ports, then(trie(destinationIP(), routes, balanced(r.table(&v.Egress)))))
	l.FilterChains = []*listenerv3.FilterChain{
		{Name: names.ChainBlackhole, Filters: []*listenerv3.Filter{tcpProxy("blackhole", names.ClusterDeny)}},
		{Name: names.ChainDeny, Filters: []*listenerv3.Filter{tcpProxy("deny", names.ClusterDeny)}},
		{Name: names.ChainMesh, Filters: []*listenerv3.Filter{nameOnDemand(), onDemand()}},
		{Name: names.ChainNode, Filters: []*listenerv3.Filter{alone(), onward("node", names.ClusterPassthrough, names.ChainNode)}},
		{Name: names.ChainPassthrough, Filters: []*listenerv3.Filter{alone(), onward("passthrough", names.ClusterPassthrough, names.ChainPassthrough)}},
	}
	return l
}

// nodePorts takes connections to node ports out: behind those a node balances, so that they are destinations like cluster IPs, and policy speaks of
// their endpoints. If the node did it the endpoint would see the node's address, which it always admits if it is on that node.
func nodePorts(ports verdict.PortRange, otherwise *matcherv3.Matcher_OnMatch) *matcherv3.Matcher_OnMatch {
	return then(&matcherv3.Matcher{
		MatcherType: &matcherv3.Matcher_MatcherList_{MatcherList: &matcherv3.Matcher_MatcherList{Matchers: []*matcherv3.Matcher_MatcherList_FieldMatcher{{
			Predicate: portIn([]verdict.PortRange{ports}),
			OnMatch:   chain(names.ChainMesh),
		}}}},
		OnNoMatch: otherwise,
	})
}

// capturing is a listener on both families that the pod's redirect leads to.
func capturing(name string, port uint32) *listenerv3.Listener {
	a := address(netip.IPv6Unspecified(), port)
	a.GetSocketAddress().Ipv4Compat = true
	return &listenerv3.Listener{Name: name, Address: a, TcpBacklogSize: wrapperspb.UInt32(4096)}
}

// matcherOf makes a matcher of what may be a bare action.
func matcherOf(on *matcherv3.Matcher_OnMatch) *matcherv3.Matcher {
	if m := on.GetMatcher(); m != nil {
		return m
	}
	return &matcherv3.Matcher{OnNoMatch: on}
}

func listenerFilter(name string, m proto.Message) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: name, ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(m)}}
}

func originalDst() *listenerv3.ListenerFilter {
	return listenerFilter("original_dst", &originaldstv3.OriginalDst{})
}

func filter(name string, m proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(m)}}
}

func tcpProxy(stat, cluster string) *listenerv3.Filter {
	return filter("tcp_proxy", &tcpproxyv3.TcpProxy{StatPrefix: stat, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: cluster}})
}

// onward is the last step of a chain that lets connections pass: to the app or out of the pod.
func onward(stat, cluster, chain string) *listenerv3.Filter {
	return filter("tcp_proxy", &tcpproxyv3.TcpProxy{
		StatPrefix: stat, ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: cluster},
		AccessLog: openLog(chain), AccessLogOptions: atOnce(),
	})
}

// atOnce has the log speak as soon as a connection stands.
func atOnce() *tcpproxyv3.TcpProxy_TcpAccessLogOptions {
	return &tcpproxyv3.TcpProxy_TcpAccessLogOptions{FlushAccessLogOnConnected: true}
}

// toGateAfterHandshake opens the way to the gate when the peer has proved who it is, and does not wait for its first byte: the
// app may be the one that speaks first.
func toGateAfterHandshake() *listenerv3.Filter {
	return filter("tcp_proxy", &tcpproxyv3.TcpProxy{
		StatPrefix:          "mtls",
		ClusterSpecifier:    &tcpproxyv3.TcpProxy_Cluster{Cluster: names.ClusterToGate},
		UpstreamConnectMode: tcpproxyv3.UpstreamConnectMode_ON_DOWNSTREAM_TLS_HANDSHAKE,
		MaxEarlyDataBytes:   wrapperspb.UInt32(earlyData),
	})
}

func rbacFilter() *listenerv3.Filter {
	return &listenerv3.Filter{Name: names.RBAC, ConfigType: &listenerv3.Filter_ConfigDiscovery{ConfigDiscovery: &corev3.ExtensionConfigSource{
		ConfigSource: ads(),
		TypeUrls:     []string{pack(&rbacv3.RBAC{}).TypeUrl},
	}}}
}

// state sets one filter state object, handed on to the gate.
func state(key, factory, format string) *filterstatev3.FilterStateValue {
	return &filterstatev3.FilterStateValue{
		Key:                &filterstatev3.FilterStateValue_ObjectKey{ObjectKey: key},
		FactoryKey:         factory,
		SharedWithUpstream: filterstatev3.FilterStateValue_ONCE,
		Value: &filterstatev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{
			Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
				Specifier: &corev3.DataSource_InlineString{InlineString: format}}},
		}},
	}
}

// trueAddresses let the gate see the addresses of the captured connection.
func trueAddresses() []*filterstatev3.FilterStateValue {
	return []*filterstatev3.FilterStateValue{
		unshared(),
		state("envoy.filters.listener.original_dst.local_ip", "", "%DOWNSTREAM_LOCAL_ADDRESS%"),
		state("envoy.filters.listener.original_dst.remote_ip", "", "%DOWNSTREAM_REMOTE_ADDRESS%"),
	}
}

// unshared keeps connections apart on their way on. Envoy pools upstream connections by destination: of many that are under way at once
// one that fails takes all others with it, those that come about nevertheless stay open unused, and whoever comes next is given
// one of them, decided upon in another's name. Hashable state that is shared with upstream divides the pools; the id is unique.
func unshared() *filterstatev3.FilterStateValue {
	return state("mantlet.connection", "envoy.hashable_string", "%CONNECTION_ID%")
}

func alone() *listenerv3.Filter {
	return filter("unshared", &setfilterstatev3.Config{OnNewConnection: []*filterstatev3.FilterStateValue{unshared()}})
}

func mtlsState() *listenerv3.Filter {
	return filter("set_filter_state", &setfilterstatev3.Config{OnDownstreamTlsHandshake: append(
		[]*filterstatev3.FilterStateValue{state(names.PeerID, "envoy.string", "%DOWNSTREAM_PEER_URI_SAN%")}, trueAddresses()...)})
}

func plainState() *listenerv3.Filter {
	return filter("set_filter_state", &setfilterstatev3.Config{OnNewConnection: append(
		[]*filterstatev3.FilterStateValue{state(names.PeerID, "envoy.string", names.Plaintext)}, trueAddresses()...)})
}

// onDemandTimeout bounds how long a first connection waits for the control plane's word; without it the connection is closed.
const onDemandTimeout = 2 * time.Second

// nameOnDemand names the cluster by the destination.
func nameOnDemand() *listenerv3.Filter {
	s := state("envoy.tcp_proxy.cluster", "", names.OnDemandPrefix+"%DOWNSTREAM_LOCAL_ADDRESS%")
	s.SharedWithUpstream = filterstatev3.FilterStateValue_NONE
	return filter("set_filter_state", &setfilterstatev3.Config{OnNewConnection: []*filterstatev3.FilterStateValue{s, unshared()}})
}

func onDemand() *listenerv3.Filter {
	return filter("tcp_proxy", &tcpproxyv3.TcpProxy{
		StatPrefix:       "mesh",
		ClusterSpecifier: &tcpproxyv3.TcpProxy_Cluster{Cluster: names.ClusterDeny}, // where the filter state should be missing
		OnDemand:         &tcpproxyv3.TcpProxy_OnDemand{OdcdsConfig: ads(), Timeout: durationpb.New(onDemandTimeout)},
		AccessLog:        openLog(names.ChainMesh),
		AccessLogOptions: atOnce(),
	})
}

// commonTLS is the same at both ends.
func commonTLS() *tlsv3.CommonTlsContext {
	return &tlsv3.CommonTlsContext{
		AlpnProtocols: []string{names.ALPN},
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
			TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		},
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{secret(names.SecretWorkload)},
	}
}

func downstreamTLS(sessions Resumption) *corev3.TransportSocket {
	c := commonTLS()
	c.ValidationContextType = &tlsv3.CommonTlsContext_ValidationContextSdsSecretConfig{ValidationContextSdsSecretConfig: secret(names.SecretBundle)}
	return sessions.downstream(c)
}

func transportSocket(name string, m proto.Message) *corev3.TransportSocket {
	return &corev3.TransportSocket{Name: name, ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: pack(m)}}
}
