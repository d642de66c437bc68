package server_test

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/mantlet/mantlet/xds/server"
)

// fleet is many sidecars that ACK everything, on a few connections.
func fleet(b *testing.B, bench *bench, size int) []server.Client {
	b.Helper()
	var conns []*grpc.ClientConn
	for range 8 {
		conn, err := grpc.NewClient("unix:"+bench.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			b.Fatal(err)
		}
		conns = append(conns, conn)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	names := make([]server.Client, size)
	for i := range size {
		names[i] = server.Client(fmt.Sprintf("shop/web-%d", i))
		ctx := metadata.AppendToOutgoingContext(ctx, clientKey, string(names[i]))
		stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conns[i%len(conns)]).DeltaAggregatedResources(ctx)
		if err != nil {
			b.Fatal(err)
		}
		for _, req := range []*discoveryv3.DeltaDiscoveryRequest{
			{TypeUrl: server.ClusterType}, {TypeUrl: server.ListenerType},
			{TypeUrl: server.ExtensionType, ResourceNamesSubscribe: []string{"rbac"}},
		} {
			if err := stream.Send(req); err != nil {
				b.Fatal(err)
			}
		}
		go func() {
			defer func() { done <- struct{}{} }()
			for {
				resp, err := stream.Recv()
				if err != nil {
					return
				}
				_ = stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce})
			}
		}()
	}
	b.Cleanup(func() {
		cancel()
		for range size {
			<-done
		}
		for _, conn := range conns {
			_ = conn.Close()
		}
	})
	return names
}

// BenchmarkPublish changes the gate (16 KB) of some of 1,000 connected sidecars, calls Publish for all of them, and waits for
// the ACKs. What it costs should go with the sidecars that are affected.
func BenchmarkPublish(b *testing.B) {
	const size = 1000
	for _, affected := range []int{0, 10, size} {
		b.Run(fmt.Sprintf("to-%d-of-%d", affected, size), func(b *testing.B) {
			bench := start(b, nil)
			rest := []*server.Resource{lds(b, "inbound", "x"), lds(b, "outbound", "x"), ecds(b, "rbac", "x"), cds(b, "app", "x"), cds(b, "deny", "x"), cds(b, "to-gate", "x")}
			gate := func(i int) server.Set {
				return set(b, append(rest, lds(b, "gate", strings.Repeat("x", 16<<10)+fmt.Sprint(i)))...)
			}
			same := gate(0)
			clients := fleet(b, bench, size)
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
			defer cancel()
			for _, c := range clients {
				bench.Publish(c, same)
			}
			wait := func(clients []server.Client) {
				for _, c := range clients {
					if err := bench.Ledger().Wait(ctx, c); err != nil {
						b.Fatal(err)
					}
				}
			}
			wait(clients)
			before := bench.Ledger().Totals()[server.ListenerType]
			i := 0
			for b.Loop() {
				i++
				other := gate(i)
				for j, c := range clients {
					if j < affected {
						bench.Publish(c, other)
					} else {
						bench.Publish(c, same)
					}
				}
				wait(clients[:affected])
			}
			after := bench.Ledger().Totals()[server.ListenerType]
			b.ReportMetric(float64(after.Responses-before.Responses)/float64(i), "pushes/op")
			b.ReportMetric(float64(after.Bytes-before.Bytes)/float64(i), "wire-B/op")
		})
	}
}

// BenchmarkPublishDisconnected is what it costs to hold 10,000 sidecars with 12 resources each, without their streams.
func BenchmarkPublishDisconnected(b *testing.B) {
	const size = 10000
	var list []*server.Resource
	for i := range 12 {
		list = append(list, lds(b, fmt.Sprint("listener", i), "x"))
	}
	names := make([]server.Client, size)
	for i := range names {
		names[i] = server.Client(fmt.Sprintf("shop/web-%d", i))
	}
	common := set(b, list...)
	for b.Loop() {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		s := server.New(server.Config{Authenticator: byMetadata{}})
		for _, c := range names {
			s.Publish(c, common)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/size, "heap-B/client")
		runtime.KeepAlive(s)
	}
}
