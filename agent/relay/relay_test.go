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
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type (
	upstreamStream = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	envoyStream    = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	deltaRequest   = discoveryv3.DeltaDiscoveryRequest
	deltaResponse  = discoveryv3.DeltaDiscoveryResponse
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

func newBench(t *testing.T) *bench {
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

// connect opens Envoy's side.
func (b *bench) connect() envoyStream {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 30*time.Second)
	b.t.Cleanup(cancel)
	s, err := b.envoy.DeltaAggregatedResources(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := s.Send(&deltaRequest{TypeUrl: TypeListener, ResourceNamesSubscribe: []string{"*"}}); err != nil {
		b.t.Fatal(err)
	}
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

func TestMessagesPassAsTheyAre(t *testing.T) {
	b := newBench(t)
	close(b.ready)
	down := b.connect()
	up := b.upstream()
	if _, err := up.Recv(); err != nil { // connect's
		t.Fatal(err)
	}
	req := &deltaRequest{TypeUrl: TypeListener, InitialResourceVersions: map[string]string{"a": "1"}, ResponseNonce: "9"}
	req.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 999, protowire.BytesType), "of a later Envoy"))
	if err := down.Send(req); err != nil {
		t.Fatal(err)
	}
	gotReq, err := up.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(req, gotReq, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	resp := &deltaResponse{TypeUrl: TypeListener, Nonce: "1", Resources: []*discoveryv3.Resource{
		{Name: "a", Resource: &anypb.Any{TypeUrl: "x/of.no.known.type", Value: []byte{0xff, 0xff}}}}}
	resp.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 998, protowire.VarintType), 5))
	if err := up.Send(resp); err != nil {
		t.Fatal(err)
	}
	gotResp, err := down.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if !proto.Equal(resp, gotResp) {
		t.Errorf("response %v became %v", resp, gotResp)
	}
}

func TestLedgerFollowsTheStream(t *testing.T) {
	b := newBench(t)
	close(b.ready)
	down := b.connect()
	up := b.upstream()
	if err := up.Send(&deltaResponse{TypeUrl: TypeListener, Nonce: "1", Resources: []*discoveryv3.Resource{{Name: "gate"}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := down.Recv(); err != nil {
		t.Fatal(err)
	}
	if len(b.relay.Ledger().Missing(TypeListener, "gate")) == 0 {
		t.Error("held before it was ACKed")
	}
	if err := down.Send(&deltaRequest{TypeUrl: TypeListener, ResponseNonce: "1"}); err != nil {
		t.Fatal(err)
	}
	for {
		changed := b.relay.Ledger().Changed()
		if len(b.relay.Ledger().Missing(TypeListener, "gate")) == 0 {
			break
		}
		select {
		case <-changed:
		case <-time.After(30 * time.Second):
			t.Fatal("the ACK does not count")
		}
	}
}

// Envoy is to come back and say what it holds, so its stream ends with the control plane's.
func TestControlPlaneEnds(t *testing.T) {
	b := newBench(t)
	close(b.ready)
	for i, end := range []error{nil, status.Error(codes.PermissionDenied, "who are you")} {
		down := b.connect()
		up := b.upstream()
		if err := up.Send(&deltaResponse{TypeUrl: TypeListener, Nonce: "1"}); err != nil {
			t.Fatal(err)
		}
		if _, err := down.Recv(); err != nil {
			t.Fatal(err)
		}
		if trouble := b.relay.Trouble(); trouble != "" {
			t.Errorf("%d: trouble while connected: %s", i, trouble)
		}
		b.plane.end <- end
		if _, err := down.Recv(); status.Code(err) != codes.Unavailable {
			t.Errorf("%d: envoy's stream: %v", i, err)
		}
		want := "ended the stream"
		if end != nil {
			want = "who are you"
		}
		if trouble := b.relay.Trouble(); !strings.Contains(trouble, want) {
			t.Errorf("%d: trouble %q, want %q", i, trouble, want)
		}
	}
}

func TestEnvoyEnds(t *testing.T) {
	b := newBench(t)
	close(b.ready)
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := b.envoy.DeltaAggregatedResources(ctx); err != nil {
		t.Fatal(err)
	}
	up := b.upstream()
	cancel()
	select {
	case <-up.Context().Done():
	case <-time.After(30 * time.Second):
		t.Error("the control plane's stream outlives Envoy's")
	}
}

func TestNewStreamDisplacesTheOld(t *testing.T) {
	b := newBench(t)
	close(b.ready)
	first := b.connect()
	up := b.upstream()
	second := b.connect()
	if _, err := first.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("first stream: %v", err)
	}
	<-up.Context().Done()
	if err := b.upstream().Send(&deltaResponse{TypeUrl: TypeListener, Nonce: "1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := second.Recv(); err != nil {
		t.Errorf("second stream: %v", err)
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
	for deadline := time.Now().Add(30 * time.Second); !strings.Contains(b.relay.Trouble(), "the way is closed"); {
		if time.Now().After(deadline) {
			t.Fatalf("trouble: %q", b.relay.Trouble())
		}
		time.Sleep(time.Millisecond) //nolint:forbidigo // there is no event for a text that changes
	}
	b.down.Store(false)
	b.upstream() // Envoy's stream was kept waiting
}

// A malformed response ends the stream; what is behind it is not passed on.
func TestRulesOfTheProtocol(t *testing.T) {
	b := newBench(t)
	close(b.ready)
	down := b.connect()
	if err := b.upstream().Send(&deltaResponse{TypeUrl: TypeListener}); err != nil {
		t.Fatal(err)
	}
	if _, err := down.Recv(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "nonce") {
		t.Errorf("a response without a nonce: %v", err)
	}
}

// An Envoy that does not read holds up the control plane; the relay does not fill its memory.
func TestNothingIsQueued(t *testing.T) {
	b := newBench(t)
	close(b.ready)
	b.connect()
	up := b.upstream()
	const many, size = 2000, 256 << 10
	var sent atomic.Int64
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for i := range many {
			r := &deltaResponse{TypeUrl: TypeListener, Nonce: strconv.Itoa(i), SystemVersionInfo: strings.Repeat("x", size)}
			if up.Send(r) != nil {
				return
			}
			sent.Add(1)
		}
	}()
	for last := int64(-1); last != sent.Load(); { // until it stands still
		last = sent.Load()
		time.Sleep(300 * time.Millisecond) //nolint:forbidigo // that nothing happens can only be waited for
	}
	if n := sent.Load(); n > 100 {
		t.Errorf("%d messages of %d KiB went out unread", n, size>>10)
	}
	b.relay.Close()
	<-ended
}

func TestCloseEndsStreams(t *testing.T) {
	b := newBench(t)
	close(b.ready)
	down := b.connect()
	b.upstream()
	b.relay.Close()
	if _, err := down.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("open stream: %v", err)
	}
	if _, err := b.connect().Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("later stream: %v", err)
	}
}
