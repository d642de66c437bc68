package xds

import (
	"testing"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	accesslogdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	grpclogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"

	"github.com/mantlet/mantlet/xds/names"
)

// TestOpenLog: the agent is told of beginnings at once, and of ends: each exactly once, with the same tags.
func TestOpenLog(t *testing.T) {
	for _, chain := range []string{names.ChainAllow, names.ChainMesh, names.ChainNode, names.ChainPassthrough} {
		logs := openLog(chain)
		for of, buffered := range map[accesslogdatav3.AccessLogType]bool{
			accesslogdatav3.AccessLogType_TcpUpstreamConnected: false,
			accesslogdatav3.AccessLogType_TcpConnectionEnd:     true,
		} {
			var told []*accesslogv3.AccessLog
			for _, l := range logs {
				for _, is := range l.GetFilter().GetLogTypeFilter().GetTypes() {
					if is == of {
						told = append(told, l)
					}
				}
			}
			if len(told) != 1 {
				t.Errorf("%s: %s is logged %d times", chain, of, len(told))
				continue
			}
			var c grpclogv3.TcpGrpcAccessLogConfig
			if err := told[0].GetTypedConfig().UnmarshalTo(&c); err != nil {
				t.Fatal(err)
			}
			common := c.GetCommonConfig()
			if size := common.GetBufferSizeBytes(); (size != nil && size.GetValue() == 0) == buffered {
				t.Errorf("%s: %s is logged with a buffer of %v", chain, of, size)
			}
			if common.GetLogName() != names.LogOpen {
				t.Errorf("%s: %s goes to log %q", chain, of, common.GetLogName())
			}
			tags := map[string]bool{}
			for _, tag := range common.GetCustomTags() {
				tags[tag.GetTag()] = true
			}
			for _, name := range []string{names.TagPeer, names.TagProof, names.TagChain, names.TagAlways} {
				if !tags[name] {
					t.Errorf("%s: %s is logged without %s", chain, of, name)
				}
			}
		}
	}
}
