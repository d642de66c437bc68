package flows

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"slices"
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
type notebook struct {
	opened []Connection
	closed []End
}

func (n *notebook) Opened(c Connection) { n.opened = append(n.opened, c) }
func (n *notebook) Closed(list []End)   { n.closed = append(n.closed, list...) }

// Connections are told of when they begin, and that is no record.
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
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.Run(ctx)
	if out.Len() > 0 {
		t.Errorf("records:\n%s", &out)
	}
}

// Of their ends the logs tell that records are made of. What was handed to the gate has its end there, and what never came about has none.
func TestObserveEnds(t *testing.T) {
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var out bytes.Buffer
	var got notebook
	r := New(&out, func() string { return "" }, slog.New(slog.DiscardHandler))
	r.Observe(&got)
	entry := func(cluster string, local uint16) *accesslogv3.TCPAccessLogEntry {
		c := &accesslogv3.AccessLogCommon{
			StartTime: timestamppb.New(began), UpstreamCluster: cluster, AccessLogType: accesslogv3.AccessLogType_NotSet,
			DownstreamRemoteAddress: socket("10.0.0.1:4000"), DownstreamLocalAddress: socket("10.0.0.2:80"),
			UpstreamRemoteAddress: socket("10.0.0.2:8080"),
		}
		if local != 0 {
			c.UpstreamLocalAddress = socket(netip.AddrPortFrom(netip.MustParseAddr("10.0.0.2"), local).String())
		}
		return &accesslogv3.TCPAccessLogEntry{CommonProperties: c}
	}
	for log, entries := range map[string][]*accesslogv3.TCPAccessLogEntry{
		names.LogGate:     {entry(names.ClusterApp, 1), entry(names.ClusterApp, 0), entry(names.ClusterApp, 2)},
		names.LogInbound:  {entry(names.ClusterToGate, 3), entry(names.ClusterApp, 4)},
		names.LogOutbound: {entry("od|10.0.0.2:80", 5), entry(names.ClusterPassthrough, 6)},
	} {
		err := send(t, client(t, r), &servicev3.StreamAccessLogsMessage{
			Identifier: &servicev3.StreamAccessLogsMessage_Identifier{LogName: log},
			LogEntries: &servicev3.StreamAccessLogsMessage_TcpLogs{TcpLogs: &servicev3.StreamAccessLogsMessage_TCPAccessLogEntries{LogEntry: entries}},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	var ports []uint16
	for _, e := range got.closed {
		if !e.Began.Equal(began) || e.Remote != netip.MustParseAddrPort("10.0.0.2:8080") || e.Local.Addr() != netip.MustParseAddr("10.0.0.2") {
			t.Errorf("%+v", e)
		}
		ports = append(ports, e.Local.Port())
	}
	slices.Sort(ports)
	if want := []uint16{1, 2, 4, 5, 6}; !slices.Equal(ports, want) {
		t.Errorf("ended %v, want %v", ports, want)
	}
	if len(got.opened) > 0 {
		t.Errorf("opened %+v", got.opened)
	}
}
