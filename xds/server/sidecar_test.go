package server_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/mantlet/mantlet/xds/server"
)

// short names of types, as the tests write them.
var typeURLs = map[string]string{
	"lds": server.ListenerType, "cds": server.ClusterType, "ecds": server.ExtensionType,
	"own": "type.googleapis.com/google.protobuf.StringValue", "fence": "type.googleapis.com/test.Fence",
}

func shortType(url string) string {
	for short, u := range typeURLs {
		if u == url {
			return short
		}
	}
	return url
}

// sidecar is a delta client that does only what the test says.
type sidecar struct {
	t         testing.TB
	stream    discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	responses chan *discoveryv3.DeltaDiscoveryResponse
	ended     chan error // one error, when the stream has ended
	cancel    func()
	sending   sync.Mutex
}

func (b *bench) connect(t testing.TB, client string) *sidecar {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+b.socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	if client != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, clientKey, client)
	}
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	s := &sidecar{t: t, stream: stream, responses: make(chan *discoveryv3.DeltaDiscoveryResponse), ended: make(chan error, 1)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			resp, err := stream.Recv()
			if err != nil {
				s.ended <- err
				return
			}
			select {
			case s.responses <- resp:
			case <-ctx.Done():
				s.ended <- ctx.Err()
				return
			}
		}
	}()
	s.cancel = func() { cancel(); <-done; _ = conn.Close() }
	t.Cleanup(s.cancel)
	return s
}

func (s *sidecar) send(req *discoveryv3.DeltaDiscoveryRequest) {
	s.t.Helper()
	if err := s.trySend(req); err != nil {
		s.t.Fatalf("send: %v", err)
	}
}

func (s *sidecar) trySend(req *discoveryv3.DeltaDiscoveryRequest) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	return s.stream.Send(req)
}

// ask subscribes and unsubscribes ("-name"). No names at all is the implicit wildcard, on the first request of a type.
func (s *sidecar) ask(short string, names ...string) {
	s.t.Helper()
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURLs[short]}
	for _, n := range names {
		if rest, ok := strings.CutPrefix(n, "-"); ok {
			req.ResourceNamesUnsubscribe = append(req.ResourceNamesUnsubscribe, rest)
		} else {
			req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, n)
		}
	}
	s.send(req)
}

// resume is the first request of a type after a reconnect: what is subscribed to, and what the client holds.
func (s *sidecar) resume(short string, holds map[string]string, names ...string) {
	s.t.Helper()
	s.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURLs[short], ResourceNamesSubscribe: names, InitialResourceVersions: holds})
}

// next is the next response.
func (s *sidecar) next() *discoveryv3.DeltaDiscoveryResponse {
	s.t.Helper()
	select {
	case r := <-s.responses:
		return r
	case err := <-s.ended:
		s.t.Fatalf("stream ended instead of a response: %v", err)
	case <-time.After(15 * time.Second):
		s.t.Fatal("no response")
	}
	return nil
}

// wants reads the next response and compares it with its text form, for example "cds +a +b -c". It ACKs nothing.
func (s *sidecar) wants(text string) *discoveryv3.DeltaDiscoveryResponse {
	s.t.Helper()
	r := s.next()
	if got := describe(r); got != text {
		s.t.Fatalf("got  response %q\nwant response %q", got, text)
	}
	return r
}

// gets is wants followed by an ACK.
func (s *sidecar) gets(text string) *discoveryv3.DeltaDiscoveryResponse {
	s.t.Helper()
	r := s.wants(text)
	s.ack(r)
	return r
}

func describe(r *discoveryv3.DeltaDiscoveryResponse) string {
	parts := []string{shortType(r.TypeUrl)}
	for _, x := range r.Resources {
		parts = append(parts, "+"+x.Name)
	}
	for _, x := range r.RemovedResources {
		parts = append(parts, "-"+x)
	}
	return strings.Join(parts, " ")
}

func (s *sidecar) ack(r *discoveryv3.DeltaDiscoveryResponse) {
	s.t.Helper()
	s.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
}

func (s *sidecar) nack(r *discoveryv3.DeltaDiscoveryResponse, reason string) {
	s.t.Helper()
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce}
	nack(req, reason)
	s.send(req)
}

func nack(req *discoveryv3.DeltaDiscoveryRequest, reason string) {
	req.ErrorDetail = &rpcstatus.Status{Code: 3, Message: reason}
}

// silent shows that nothing was due: the server answers in order, so what was due would come before the answer to this.
func (s *sidecar) silent() {
	s.t.Helper()
	s.ask("fence", "*")
	s.gets("fence")
}

// end waits for the end of the stream.
func (s *sidecar) end() error {
	s.t.Helper()
	for {
		select {
		case <-s.responses:
		case err := <-s.ended:
			return err
		case <-time.After(15 * time.Second):
			s.t.Fatal("the stream does not end")
		}
	}
}

// holds are the versions in responses, as a client would list them after a reconnect.
func holds(responses ...*discoveryv3.DeltaDiscoveryResponse) map[string]string {
	out := map[string]string{}
	for _, r := range responses {
		for _, x := range r.Resources {
			out[x.Name] = x.Version
		}
		for _, x := range r.RemovedResources {
			delete(out, x)
		}
	}
	return out
}

// status is a client in the ledger, as text: every resource with what is the matter with it.
func (b *bench) status(client string) string {
	cs, ok := b.Ledger().Status(server.Client(client))
	if !ok {
		return "unknown"
	}
	var parts []string
	for _, r := range cs.Resources {
		what := "pending"
		switch {
		case r.InForce:
			what = "in force"
		case r.Refusal != nil:
			what = "refused: " + r.Refusal.Reason
		case !r.Subscribed:
			what = "not subscribed"
		}
		parts = append(parts, fmt.Sprintf("%s %s %s", shortType(r.Type), r.Name, what))
	}
	return strings.Join(parts, "; ")
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
