package xds

import (
	"fmt"
	"net/netip"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	accesslogdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	grpclogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	metadatav3 "github.com/envoyproxy/go-control-plane/envoy/type/metadata/v3"
	tracingv3 "github.com/envoyproxy/go-control-plane/envoy/type/tracing/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mantlet/mantlet/xds/names"
)

// pack wraps a message deterministically: the version of a resource is the hash of its bytes.
func pack(m proto.Message) *anypb.Any {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil { // only invalid UTF-8 can fail, and nothing here comes from outside unchecked
		panic(fmt.Sprintf("xds: marshal %T: %v", m, err))
	}
	return &anypb.Any{TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()), Value: b}
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		ResourceApiVersion:    corev3.ApiVersion_V3,
	}
}

func agent() *corev3.GrpcService {
	return &corev3.GrpcService{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: names.ClusterAgent}}}
}

// secret refers to an SDS secret that the agent serves over its own socket: keys never pass the control plane.
func secret(name string) *tlsv3.SdsSecretConfig {
	return &tlsv3.SdsSecretConfig{
		Name: name,
		SdsConfig: &corev3.ConfigSource{
			ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
				ApiType:                   corev3.ApiConfigSource_GRPC,
				TransportApiVersion:       corev3.ApiVersion_V3,
				SetNodeOnFirstMessageOnly: true,
				GrpcServices:              []*corev3.GrpcService{agent()},
			}},
			ResourceApiVersion: corev3.ApiVersion_V3,
		},
	}
}

func address(a netip.Addr, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address: a.String(), PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: port},
	}}}
}

// flushAccessLog is how long the agent may learn of a connection after its end. Envoy's own default is 1 s.
const flushAccessLog = 100 * time.Millisecond

func accessLog(name string, tags ...*tracingv3.CustomTag) []*accesslogv3.AccessLog {
	c := logConfig(name, tags)
	c.BufferFlushInterval = durationpb.New(flushAccessLog)
	return []*accesslogv3.AccessLog{asLog(c)}
}

// openLog tells the agent of connections as they begin, in time to cut one that was let pass a moment before policy changed. So nothing is
// buffered: each entry is sent at once, and Envoy sets no timer for it. What cannot be sent yet is kept, not dropped. Their ends are in no hurry, and
// the listener's own log tells of them, many in one message.
func openLog(chain string) []*accesslogv3.AccessLog {
	tags := []*tracingv3.CustomTag{literal(names.TagChain, chain)}
	switch chain {
	case names.ChainMesh:
		tags = append(tags, ofDestination()...)
		tags = append(tags, ofEndpoint(names.TagAlways, names.EndpointMetadata, names.EndpointAlways))
	case names.ChainNode:
		tags = append(tags, literal(names.TagAlways, names.AlwaysAllowed))
	}
	c := logConfig(names.LogOpen, tags)
	c.BufferSizeBytes = wrapperspb.UInt32(0)
	l := asLog(c)
	l.Filter = &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_LogTypeFilter{LogTypeFilter: &accesslogv3.LogTypeFilter{
		Types: []accesslogdatav3.AccessLogType{accesslogdatav3.AccessLogType_TcpUpstreamConnected}}}}
	return []*accesslogv3.AccessLog{l}
}

func logConfig(name string, tags []*tracingv3.CustomTag) *grpclogv3.CommonGrpcAccessLogConfig {
	return &grpclogv3.CommonGrpcAccessLogConfig{
		LogName:                 name,
		GrpcService:             agent(),
		TransportApiVersion:     corev3.ApiVersion_V3,
		FilterStateObjectsToLog: []string{names.PeerID},
		CustomTags:              tags,
	}
}

// ofDestination says who the endpoint is that a connection goes to. Only the endpoints of on-demand clusters say so: elsewhere these tags would make each
// update of the listener dearer, and never be there.
func ofDestination() []*tracingv3.CustomTag {
	return []*tracingv3.CustomTag{ofEndpoint(names.TagPeer, names.EndpointMetadata, names.EndpointPeer), ofEndpoint(names.TagProof, names.EndpointMetadata, names.EndpointProof)}
}

func asLog(c *grpclogv3.CommonGrpcAccessLogConfig) *accesslogv3.AccessLog {
	return &accesslogv3.AccessLog{
		Name:       c.LogName,
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: pack(&grpclogv3.TcpGrpcAccessLogConfig{CommonConfig: c})},
	}
}

func literal(tag, value string) *tracingv3.CustomTag {
	return &tracingv3.CustomTag{Tag: tag, Type: &tracingv3.CustomTag_Literal_{Literal: &tracingv3.CustomTag_Literal{Value: value}}}
}

// ofEndpoint logs metadata of the endpoint that a connection goes to, where there is such.
func ofEndpoint(tag, filter, field string) *tracingv3.CustomTag {
	return &tracingv3.CustomTag{Tag: tag, Type: &tracingv3.CustomTag_Metadata_{Metadata: &tracingv3.CustomTag_Metadata{
		Kind: &metadatav3.MetadataKind{Kind: &metadatav3.MetadataKind_Host_{Host: &metadatav3.MetadataKind_Host{}}},
		MetadataKey: &metadatav3.MetadataKey{Key: filter, Path: []*metadatav3.MetadataKey_PathSegment{
			{Segment: &metadatav3.MetadataKey_PathSegment_Key{Key: field}}}},
	}}}
}
