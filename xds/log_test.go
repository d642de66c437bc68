package xds

import (
	"testing"

	accesslogdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	grpclogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"

	"github.com/mantlet/mantlet/xds/names"
)

// TestOpenLog: the agent is told of beginnings at once, each exactly once; the ends are the other logs'.
func TestOpenLog(t *testing.T) {
	for _, chain := range []string{names.ChainAllow, names.ChainMesh, names.ChainNode, names.ChainPassthrough} {
		logs := openLog(chain)
		if len(logs) != 1 {
			t.Fatalf("%s: %d logs", chain, len(logs))
		}
		if got := logs[0].GetFilter().GetLogTypeFilter().GetTypes(); len(got) != 1 || got[0] != accesslogdatav3.AccessLogType_TcpUpstreamConnected {
			t.Errorf("%s: logs %v", chain, got)
		}
		var c grpclogv3.TcpGrpcAccessLogConfig
		if err := logs[0].GetTypedConfig().UnmarshalTo(&c); err != nil {
			t.Fatal(err)
		}
		common := c.GetCommonConfig()
		if size := common.GetBufferSizeBytes(); size == nil || size.GetValue() != 0 {
			t.Errorf("%s: logged with a buffer of %v", chain, size)
		}
		if common.GetLogName() != names.LogOpen {
			t.Errorf("%s: goes to log %q", chain, common.GetLogName())
		}
		tags := map[string]bool{}
		for _, tag := range common.GetCustomTags() {
			tags[tag.GetTag()] = true
		}
		for _, name := range []string{names.TagPeer, names.TagProof, names.TagChain, names.TagAlways} {
			if !tags[name] {
				t.Errorf("%s: logged without %s", chain, name)
			}
		}
	}
}
