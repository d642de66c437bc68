package relay

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/testing/protocmp"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type (
	upstreamStream = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	envoyStream    = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
)

// plane is a control plane that does with each stream what the test says.
type plane struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	streams chan upstreamStream
	end     chan error // what the stream ends with
}

func (p *plane) DeltaAggregatedResources(s upstreamStream) error {
	select {
	case p.streams <- s:
	case <-s.Context().Done():
		return s.Context().Err()
	}
	select {
	case err := <-p.end:
		return err
	case <-s.Context().Done():
		return s.Context().Err()
	}
}

// bench is a relay between a fake control plane and a fake Envoy.
type bench struct {
	t     *testing.T
	plane *plane
	relay *Relay
	envoy discoveryv3.AggregatedDiscoveryServiceClient
	ready chan struct{}
	down  atomic.Bool // the control plane cannot be dialled
}

func serve(t *testing.T, s *grpc.Server) *bufconn.Listener {
	t.Helper()
	l := bufconn.Listen(64 << 10)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return l
}

// newBench makes one; prepare is for what has to be said before the relay begins.
func newBench(t *testing.T, prepare ...func(*Relay)) *bench {
	t.Helper()
	b := &bench{t: t, plane: &plane{streams: make(chan upstreamStream), end: make(chan error)}, ready: make(chan struct{})}
	ps := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(ps, b.plane)
	pl := serve(t, ps)
	up, err := grpc.NewClient("passthrough:///plane", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(Codec())),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			if b.down.Load() {
				return nil, errors.New("the way is closed")
			}
			return pl.DialContext(ctx)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { up.Close() })
	b.relay = New(up, b.ready, slog.New(slog.DiscardHandler))
	for _, p := range prepare {
		p(b.relay)
	}
	rs := grpc.NewServer(grpc.ForceServerCodecV2(Codec()))
	b.relay.Register(rs)
	rl := serve(t, rs)
	t.Cleanup(b.relay.Close)
	down, err := grpc.NewClient("passthrough:///relay", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return rl.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { down.Close() })
	b.envoy = discoveryv3.NewAggregatedDiscoveryServiceClient(down)
	return b
}

// connect opens Envoy's side, which asks for all listeners.
func (b *bench) connect() envoyStream {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 30*time.Second)
	b.t.Cleanup(cancel)
	s, err := b.envoy.DeltaAggregatedResources(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	b.says(s, &deltaRequest{TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"*"}})
	return s
}

// upstream is the control plane's side of the stream that comes next.
func (b *bench) upstream() upstreamStream {
	b.t.Helper()
	select {
	case s := <-b.plane.streams:
		return s
	case <-time.After(30 * time.Second):
		b.t.Fatal("no stream reaches the control plane")
		return nil
	}
}

// ends ends the stream that upstream returned last.
func (b *bench) ends(err error) {
	b.t.Helper()
	select {
	case b.plane.end <- err:
	case <-time.After(30 * time.Second):
		b.t.Fatal("there is no stream to end")
	}
}

func (b *bench) says(envoy envoyStream, r *deltaRequest) {
	b.t.Helper()
	if err := envoy.Send(r); err != nil {
		b.t.Fatal(err)
	}
}

// hears receives Envoy's next response and ACKs it.
func (b *bench) hears(envoy envoyStream) *deltaResponse {
	b.t.Helper()
	r, err := envoy.Recv()
	if err != nil {
		b.t.Fatal(err)
	}
	b.says(envoy, &deltaRequest{TypeUrl: r.TypeUrl, ResponseNonce: r.Nonce})
	return r
}

// wantRequest receives the control plane's next request and wants it to be the very one.
func wantRequest(t *testing.T, up upstreamStream, want *deltaRequest) {
	t.Helper()
	got, err := up.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Fatal(diff)
	}
}

func send(t *testing.T, up upstreamStream, r *deltaResponse) {
	t.Helper()
	if err := up.Send(r); err != nil {
		t.Fatal(err)
	}
}

// started is a bench whose Envoy holds the listener gate in version 1.
func started(t *testing.T, prepare ...func(*Relay)) (*bench, envoyStream, upstreamStream) {
	t.Helper()
	b := newBench(t, prepare...)
	close(b.ready)
	envoy := b.connect()
	up := b.upstream()
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"*"}})
	send(t, up, &deltaResponse{TypeUrl: TypeListener, Nonce: "1", Resources: []*discoveryv3.Resource{what{TypeListener, "gate", "1"}.resource(t)}})
	if got := b.relay.Ledger().Missing(TypeListener, "gate"); len(got) != 1 {
		t.Error("held before it was ACKed")
	}
	b.hears(envoy)
	wantRequest(t, up, &deltaRequest{TypeUrl: TypeListener, ResponseNonce: "1"})
	if got := b.relay.Ledger().Missing(TypeListener, "gate"); len(got) > 0 {
		t.Errorf("ACKed and missing: %q", got)
	}
	return b, envoy, up
}

// held is the first request of a stream on which the listener gate is held.
var held = &deltaRequest{TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"*"}, InitialResourceVersions: map[string]string{"gate": "1"}}

// awaitTrouble waits for a text that has no event.
func (b *bench) awaitTrouble(want string) {
	b.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(b.relay.Trouble(), want); {
		if time.Now().After(deadline) {
			b.t.Fatalf("trouble %q, want %q", b.relay.Trouble(), want)
		}
		time.Sleep(time.Millisecond) //nolint:forbidigo // there is no event for a text that changes
	}
}

// Envoy notices nothing of a control plane that goes and comes, and what it holds is listed.
func TestControlPlaneEnds(t *testing.T) {
	b, envoy, _ := started(t)
	for i, end := range []error{nil, status.Error(codes.PermissionDenied, "who are you")} {
		if trouble := b.relay.Trouble(); trouble != "" {
			t.Errorf("%d: trouble while connected: %s", i, trouble)
		}
		b.down.Store(true)
		b.ends(end)
		want := "ended the stream"
		if end != nil {
			want = "who are you"
		}
		b.awaitTrouble(want)
		b.down.Store(false)
		up := b.upstream()
		wantRequest(t, up, held)
		send(t, up, &deltaResponse{TypeUrl: TypeListener, Nonce: "1"})
		if r := b.hears(envoy); len(r.Resources) > 0 {
			t.Errorf("sent again: %v", r)
		}
		wantRequest(t, up, &deltaRequest{TypeUrl: TypeListener, ResponseNonce: "1"})
	}
}

// An Envoy that dies takes nothing with it: the next is served at once, without a control plane. When that is back, nothing is sent again.
func TestEnvoyIsServedFromTheCache(t *testing.T) {
	b, envoy, up := started(t)
	if err := envoy.CloseSend(); err != nil {
		t.Fatal(err)
	}
	<-up.Context().Done() // what Envoy had asked for nobody holds
	b.upstream()
	b.down.Store(true)
	b.ends(nil)
	next := b.connect()
	if r := b.hears(next); len(r.Resources) != 1 || r.Resources[0].Version != "1" {
		t.Errorf("from the cache: %v", r)
	}
	b.down.Store(false)
	wantRequest(t, b.upstream(), held)
}

func TestNewStreamDisplacesTheOld(t *testing.T) {
	b, first, _ := started(t)
	second := b.connect()
	if _, err := first.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("first stream: %v", err)
	}
	if r := b.hears(second); len(r.Resources) != 1 {
		t.Errorf("second stream: %v", r)
	}
}

func TestWaitsForTheIdentityAndTheControlPlane(t *testing.T) {
	b := newBench(t)
	b.down.Store(true)
	b.connect()
	select {
	case <-b.plane.streams:
		t.Fatal("connected without an identity")
	default:
	}
	close(b.ready)
	b.awaitTrouble("the way is closed")
	b.down.Store(false)
	b.upstream() // Envoy's stream was kept waiting
}

// What breaks the protocol ends the control plane's stream, and Envoy sees nothing of it.
func TestRulesOfTheProtocol(t *testing.T) {
	b, envoy, up := started(t)
	for _, tt := range []struct {
		response *deltaResponse
		want     string
	}{
		{&deltaResponse{TypeUrl: TypeListener}, "nonce"},
		{&deltaResponse{TypeUrl: "x/unasked", Nonce: "1"}, "not asked for"},
		{&deltaResponse{TypeUrl: TypeListener, Nonce: "1", Resources: []*discoveryv3.Resource{what{TypeListener, "gate", ""}.resource(t)}}, "version"},
		{&deltaResponse{TypeUrl: TypeListener, Nonce: "1", Resources: []*discoveryv3.Resource{what{TypeCluster, "gate", "2"}.resource(t)}}, "type"},
	} {
		send(t, up, tt.response)
		b.awaitTrouble(tt.want)
		up = b.upstream()
		wantRequest(t, up, held)
	}
	send(t, up, &deltaResponse{TypeUrl: TypeListener, Nonce: "2", RemovedResources: []string{"gate"}})
	if r := b.hears(envoy); len(r.RemovedResources) != 1 {
		t.Errorf("envoy was sent %v", r)
	}
}

// An Envoy that does not answer fills no memory, and holds up nothing that is for the agent.
func TestUnansweredIsBounded(t *testing.T) {
	got := make(chan string, 1)
	const limit = 4 << 20
	b := newBench(t, func(r *Relay) {
		r.machine.maxBytes = limit
		r.Subscribe(Own{TypeURL: ownType, Name: "mine", Apply: func(b []byte) error { got <- string(b); return nil }})
	})
	close(b.ready)
	envoy := b.connect()
	up := b.upstream()
	for range 2 {
		if _, err := up.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	send(t, up, &deltaResponse{TypeUrl: TypeListener, Nonce: "first"})
	send(t, up, &deltaResponse{TypeUrl: ownType, Nonce: "own", Resources: []*discoveryv3.Resource{what{ownType, "mine", "1"}.resource(t)}})
	<-got
	large := what{TypeListener, "gate", strings.Repeat("x", 64<<10)}.resource(t)
	sent := 0
	for ; up.Send(&deltaResponse{TypeUrl: TypeListener, Nonce: strconv.Itoa(sent), Resources: []*discoveryv3.Resource{large}}) == nil; sent++ {
		if sent > 2*limit>>16 {
			t.Fatalf("%d KiB are unanswered", sent<<6)
		}
	}
	for {
		if _, err := envoy.Recv(); err != nil {
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "unanswered") {
				t.Error(err)
			}
			return
		}
	}
}

func TestCloseEndsStreams(t *testing.T) {
	b, envoy, _ := started(t)
	b.relay.Close()
	if _, err := envoy.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("open stream: %v", err)
	}
	later, err := b.envoy.DeltaAggregatedResources(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := later.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("later stream: %v", err)
	}
}

// Who opens streams is told when the control plane refuses them for what they show, and for nothing else.
func TestRefused(t *testing.T) {
	told := make(chan struct{}, 100)
	b, _, _ := started(t, func(r *Relay) { r.OnRefused(func() { told <- struct{}{} }) })
	for _, end := range []error{status.Error(codes.PermissionDenied, "who are you"), nil} {
		b.ends(end)
		b.upstream()
	}
	if len(told) > 0 {
		t.Error("told of an end that is no refusal")
	}
	b.ends(status.Error(codes.Unauthenticated, "renew"))
	<-told
}
