package xds

import (
	"slices"
	"testing"

	accesslogdatav3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	grpclogv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/grpc/v3"

	"github.com/mantlet/mantlet/xds/names"
)

// TestOpenLog: the agent is told of beginnings at once, each exactly once; the ends are the other logs'. Of the destination is told where it says something.
func TestOpenLog(t *testing.T) {
	for chain, want := range map[string][]string{
		names.ChainAllow:       {names.TagChain},
		names.ChainMesh:        {names.TagAlways, names.TagChain, names.TagPeer, names.TagProof},
		names.ChainNode:        {names.TagAlways, names.TagChain},
		names.ChainPassthrough: {names.TagChain},
	} {
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
		var tags []string
		for _, tag := range common.GetCustomTags() {
			tags = append(tags, tag.GetTag())
		}
		slices.Sort(tags)
		slices.Sort(want)
		if !slices.Equal(tags, want) {
			t.Errorf("%s: logged with %v, want %v", chain, tags, want)
		}
	}
}
