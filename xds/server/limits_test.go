package server_test

import (
	"context"
	"strconv"
	"strings"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Who is not known yet can have few streams on a connection, and no long headers: gRPC allows as many as it counts to, and 16 MiB of headers on
// each.
func TestLimitsOfConnections(t *testing.T) {
	b := start(t, nil)
	defer b.stop()
	conn, err := grpc.NewClient("unix:"+b.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ads := discoveryv3.NewAggregatedDiscoveryServiceClient(conn)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	open := 0
	for ; open < 1000; open++ {
		// A stream that is too many waits, for as long as its context lives.
		one, stop := context.WithCancel(metadata.AppendToOutgoingContext(ctx, clientKey, strconv.Itoa(open))) // a client that comes again has its older stream ended
		late := time.AfterFunc(2*time.Second, stop)
		_, err := ads.DeltaAggregatedResources(one)
		if !late.Stop() || err != nil {
			stop()
			break
		}
		defer stop()
	}
	if open == 0 || open > 32 {
		t.Errorf("%d streams on one connection", open)
	}

	another, err := grpc.NewClient("unix:"+b.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = another.Close() }()
	for size, refused := range map[int]bool{16 << 10: false, 1 << 20: true} {
		stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(another).DeltaAggregatedResources(
			metadata.AppendToOutgoingContext(within(t, 10*time.Second), "authorization", strings.Repeat("x", size)))
		if err == nil {
			_, err = stream.Recv()
		}
		if (status.Code(err) != codes.Unauthenticated) != refused { // nobody names himself here: whoever is heard is refused for that
			t.Errorf("%d KiB of headers: %v", size>>10, err)
		}
	}
}
