package xds

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	internalv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/internal_upstream/v3"
	rawv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	envoymatcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mantlet/mantlet/xds/names"
)

// connectTimeout bounds a TCP connect with TLS handshake to another pod, or a connect to the app. It outlasts the handshakes of
// thousands of connections at once.
const connectTimeout = 10 * time.Second

// Clusters are the clusters that every sidecar has, the same for all.
func Clusters() []*clusterv3.Cluster {
	originalDestination := func(name string) *clusterv3.Cluster {
		return &clusterv3.Cluster{
			Name:                 name,
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
			LbPolicy:             clusterv3.Cluster_CLUSTER_PROVIDED,
			ConnectTimeout:       durationpb.New(connectTimeout),
			CircuitBreakers:      unlimited(),
		}
	}
	gate := static(names.ClusterToGate, []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
		Address: &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
			AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: names.Gate},
		}}},
	}}}})
	gate.TransportSocket = transportSocket("internal_upstream", &internalv3.InternalUpstreamTransport{TransportSocket: raw()})
	return []*clusterv3.Cluster{
		originalDestination(names.ClusterApp),
		static(names.ClusterDeny, nil),
		originalDestination(names.ClusterPassthrough),
		gate,
	}
}

// unlimited lifts Envoy's default of 1,024 connections per cluster: the app's own limits are to hold, not ours.
func unlimited() *clusterv3.CircuitBreakers {
	many := wrapperspb.UInt32(1 << 30)
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections: many, MaxPendingRequests: many, MaxRequests: many, MaxRetries: wrapperspb.UInt32(3),
	}}}
}

func static(name string, endpoints []*endpointv3.LbEndpoint) *clusterv3.Cluster {
	la := &endpointv3.ClusterLoadAssignment{ClusterName: name}
	if len(endpoints) > 0 {
		la.Endpoints = []*endpointv3.LocalityLbEndpoints{{LbEndpoints: endpoints}}
	}
	return &clusterv3.Cluster{
		Name:                 name,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		LbPolicy:             clusterv3.Cluster_RANDOM, // as kube-proxy does
		ConnectTimeout:       durationpb.New(connectTimeout),
		LoadAssignment:       la,
		CircuitBreakers:      unlimited(),
	}
}

func raw() *corev3.TransportSocket { return transportSocket("raw_buffer", &rawv3.RawBuffer{}) }

// Endpoint is where an on-demand cluster may connect to.
type Endpoint struct {
	Addr netip.AddrPort
	// ID is who must answer, by mTLS; zero for a plaintext endpoint: one without a sidecar, or the pod itself.
	ID spiffeid.ID
	// Peer is the identity of the pod that has the address, with or without a sidecar; zero: no pod has it. It goes to the logs.
	Peer spiffeid.ID
	// Always says that policy has no say here: the pod itself or its own node.
	Always bool
}

// metadata tells Envoy which transport socket to take, nil: the cluster's own, and its log who is there.
func (e Endpoint) metadata(match *structpb.Struct) *corev3.Metadata {
	m := &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{}}
	if match != nil {
		m.FilterMetadata[matchKey] = match
	}
	about := map[string]*structpb.Value{}
	if !e.Peer.IsZero() {
		about[names.EndpointPeer] = structpb.NewStringValue(e.Peer.String())
	}
	if !e.ID.IsZero() {
		about[names.EndpointProof] = structpb.NewStringValue(e.ID.String())
	}
	if e.Always {
		about[names.EndpointAlways] = structpb.NewStringValue(names.AlwaysAllowed)
	}
	if len(about) > 0 {
		m.FilterMetadata[names.EndpointMetadata] = &structpb.Struct{Fields: about}
	}
	return m
}

// matchKey is the endpoint metadata by which Envoy picks a transport socket; matchID in it is who must answer.
const (
	matchKey = "envoy.transport_socket_match"
	matchID  = "id"
)

// OnDemand is the cluster for one destination as one identity may reach it. Each endpoint must prove the very SAN that is expected
// of it. Without endpoints every connection is closed at once.
//
// The cluster's own transport socket is that of the first identity, and only the others have a match, so that Envoy makes one TLS context for each
// identity and none that nobody passes. An endpoint that matches none is so never reached in plaintext where any endpoint has a sidecar.
func OnDemand(name string, endpoints []Endpoint, sessions Resumption) *clusterv3.Cluster {
	c := static(name, nil)
	c.AltStatName = names.OnDemandStats
	if len(endpoints) == 0 {
		return c
	}
	first := firstIdentity(endpoints)
	c.TransportSocket = toward(first, sessions)
	hosts := make([]*endpointv3.LbEndpoint, 0, len(endpoints))
	matched := map[spiffeid.ID]bool{first: true}
	for _, e := range endpoints {
		var match *structpb.Struct
		if e.ID != first {
			match = &structpb.Struct{Fields: map[string]*structpb.Value{matchID: structpb.NewStringValue(e.ID.String())}} // "" for plaintext
		}
		hosts = append(hosts, &endpointv3.LbEndpoint{
			HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{Address: address(e.Addr.Addr(), uint32(e.Addr.Port()))}},
			Metadata:       e.metadata(match),
		})
		if !matched[e.ID] {
			matched[e.ID] = true
			c.TransportSocketMatches = append(c.TransportSocketMatches, &clusterv3.Cluster_TransportSocketMatch{
				Name: e.ID.String() + "/", Match: match, TransportSocket: toward(e.ID, sessions),
			})
		}
	}
	c.LoadAssignment.Endpoints = []*endpointv3.LocalityLbEndpoints{{LbEndpoints: hosts}}
	return c
}

// firstIdentity is that of the first endpoint that has one; zero where none has.
func firstIdentity(endpoints []Endpoint) spiffeid.ID {
	for _, e := range endpoints {
		if !e.ID.IsZero() {
			return e.ID
		}
	}
	return spiffeid.ID{}
}

// toward is the transport socket to endpoints of an identity; zero: in plaintext.
func toward(id spiffeid.ID, sessions Resumption) *corev3.TransportSocket {
	if id.IsZero() {
		return raw()
	}
	return upstreamTLS(id, sessions)
}

func upstreamTLS(id spiffeid.ID, sessions Resumption) *corev3.TransportSocket {
	c := commonTLS()
	c.ValidationContextType = &tlsv3.CommonTlsContext_CombinedValidationContext{CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
		DefaultValidationContext: &tlsv3.CertificateValidationContext{
			MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{
				SanType: tlsv3.SubjectAltNameMatcher_URI,
				Matcher: &envoymatcherv3.StringMatcher{MatchPattern: &envoymatcherv3.StringMatcher_Exact{Exact: id.String()}},
			}},
		},
		ValidationContextSdsSecretConfig: secret(names.SecretBundle),
	}}
	return transportSocket("tls", &tlsv3.UpstreamTlsContext{CommonTlsContext: c, MaxSessionKeys: sessions.maxSessionKeys()})
}

// ParseOnDemand reads the name of an on-demand cluster, "od|IP:PORT" with an IPv6 address in brackets.
func ParseOnDemand(name string) (netip.AddrPort, error) {
	rest, ok := strings.CutPrefix(name, names.OnDemandPrefix)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("cluster %q: on-demand names begin with %q", name, names.OnDemandPrefix)
	}
	a, err := netip.ParseAddrPort(rest)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("cluster %q: %w", name, err)
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), nil
}
