package flows

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	servicev3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/mantlet/mantlet/xds/names"
)

// notebook writes down what it is told.
type notebook struct{ opened, closed []Connection }

func (n *notebook) Opened(c Connection) { n.opened = append(n.opened, c) }
func (n *notebook) Closed(c Connection) { n.closed = append(n.closed, c) }

// Connections are told of when they begin and when they end, and none of it is a record: the end is in another log.
func TestObserve(t *testing.T) {
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	common := func(cluster string, change func(*accesslogv3.AccessLogCommon)) *accesslogv3.AccessLogCommon {
		c := &accesslogv3.AccessLogCommon{
			StartTime: timestamppb.New(began), UpstreamCluster: cluster, AccessLogType: accesslogv3.AccessLogType_TcpUpstreamConnected,
			DownstreamRemoteAddress: socket("10.0.0.1:4000"), DownstreamLocalAddress: socket("[::ffff:10.0.0.2]:80"),
			UpstreamLocalAddress: socket("10.0.0.2:5000"), UpstreamRemoteAddress: socket("10.0.0.2:8080"),
		}
		if change != nil {
			change(c)
		}
		return c
	}
	want := func(d Direction, cluster, peer string, authenticated, always bool) Connection {
		return Connection{
			Direction: d, Began: began, Peer: peer, Authenticated: authenticated, Always: always, Cluster: cluster,
			Source: netip.MustParseAddrPort("10.0.0.1:4000"), Destination: netip.MustParseAddrPort("10.0.0.2:80"),
			Local: netip.MustParseAddrPort("10.0.0.2:5000"), Remote: netip.MustParseAddrPort("10.0.0.2:8080"),
		}
	}
	inbound := func(id string) func(*accesslogv3.AccessLogCommon) {
		return func(c *accesslogv3.AccessLogCommon) {
			c.FilterStateObjects = object(t, wrapperspb.String(id))
			c.CustomTags = map[string]string{names.TagPeer: "spiffe://td.example/liar", names.TagProof: "spiffe://td.example/liar"}
		}
	}
	tagged := func(tags map[string]string) func(*accesslogv3.AccessLogCommon) {
		return func(c *accesslogv3.AccessLogCommon) { c.CustomTags = tags }
	}
	var entries []*accesslogv3.TCPAccessLogEntry
	var opened []Connection
	add := func(c *accesslogv3.AccessLogCommon, w Connection) {
		entries = append(entries, &accesslogv3.TCPAccessLogEntry{CommonProperties: c})
		opened = append(opened, w)
	}
	add(common(names.ClusterApp, inbound(peerID)), want(Inbound, names.ClusterApp, peerID, true, false))
	add(common(names.ClusterApp, inbound(names.Plaintext)), want(Inbound, names.ClusterApp, names.Plaintext, false, false))
	add(common(names.ClusterApp, tagged(map[string]string{names.TagAlways: names.AlwaysAllowed})), want(Inbound, names.ClusterApp, "", false, true))
	add(common("od|10.0.0.2:80", tagged(map[string]string{names.TagPeer: peerID, names.TagProof: peerID})), want(Outbound, "od|10.0.0.2:80", peerID, true, false))
	add(common("od|10.0.0.2:80", tagged(map[string]string{names.TagPeer: peerID, names.TagProof: "-"})), want(Outbound, "od|10.0.0.2:80", peerID, false, false))
	add(common("od|10.0.0.2:80", tagged(map[string]string{names.TagAlways: names.AlwaysAllowed})), want(Outbound, "od|10.0.0.2:80", "", false, true))
	add(common(names.ClusterPassthrough, tagged(map[string]string{names.TagAlways: "-"})), want(Outbound, names.ClusterPassthrough, "", false, false))
	end := common(names.ClusterPassthrough, func(c *accesslogv3.AccessLogCommon) { c.AccessLogType = accesslogv3.AccessLogType_TcpConnectionEnd })
	failed := common(names.ClusterPassthrough, func(c *accesslogv3.AccessLogCommon) {
		c.AccessLogType, c.UpstreamLocalAddress = accesslogv3.AccessLogType_TcpConnectionEnd, nil
	})
	entries = append(entries, &accesslogv3.TCPAccessLogEntry{CommonProperties: end}, &accesslogv3.TCPAccessLogEntry{CommonProperties: failed})

	var out bytes.Buffer
	var got notebook
	r := New(&out, func() string { return "" }, slog.New(slog.DiscardHandler))
	r.Observe(&got)
	if err := send(t, client(t, r), &servicev3.StreamAccessLogsMessage{
		Identifier: &servicev3.StreamAccessLogsMessage_Identifier{LogName: names.LogOpen},
		LogEntries: &servicev3.StreamAccessLogsMessage_TcpLogs{TcpLogs: &servicev3.StreamAccessLogsMessage_TCPAccessLogEntries{LogEntry: entries}},
	}); err != nil {
		t.Fatal(err)
	}
	compare := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	if diff := cmp.Diff(opened, got.opened, compare); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]Connection{want(Outbound, names.ClusterPassthrough, "", false, false)}, got.closed, compare); diff != "" {
		t.Error(diff)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.Run(ctx)
	if out.Len() > 0 {
		t.Errorf("records:\n%s", &out)
	}
}
