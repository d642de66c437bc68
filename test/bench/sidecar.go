package main

import (
	"context"
	"crypto/tls"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	_ "google.golang.org/grpc/encoding/gzip" // as agent/relay
	"google.golang.org/grpc/stats"

	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/svid"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// resourceKey names a resource: type URL and name.
type resourceKey struct{ typeURL, name string }

// versions are resources by what they are, each with its version; "" is one that the control plane said does not exist.
type versions map[resourceKey]string

// simulated is an agent and its Envoy as far as the control plane sees them: it holds what it is sent, says so, and asks for the clusters that it
// uses.
type simulated struct {
	pod     sidecarPod
	address string
	source  *svid.Builtin
	ctx     context.Context // of its life
	stop    context.CancelFunc
	ended   sync.WaitGroup

	mu       sync.Mutex
	held     versions
	await    versions // what it is waited for to hold
	arrived  chan<- arrival
	pushes   int   // responses with something in them since the last reset
	bytes    int64 // of these
	moved    time.Duration
	answered map[string]bool // types of which the present stream has brought a response
	anew     bool            // what is waited for is to be true of a stream begun since
}

// arrival says when a sidecar held all that it was waited for.
type arrival struct {
	who  string
	when time.Duration
}

func newSimulated(pod sidecarPod, address string, roots *x509bundle.Bundle) (*simulated, error) {
	s := &simulated{pod: pod, address: address, held: versions{}}
	var err error
	s.source, err = svid.NewBuiltin(svid.BuiltinConfig{
		Address: address, TrustDomain: trustDomain, Bundle: roots, Log: slog.New(slog.DiscardHandler),
		Token: func() (string, error) { return tokenOf(pod), nil },
	})
	return s, err
}

// attest gets the SVID and keeps renewing it.
func (s *simulated) attest(ctx context.Context) {
	s.ctx, s.stop = context.WithCancel(ctx)
	s.ended.Go(func() { _ = s.source.Run(s.ctx) }) // fails only where it runs already
}

// connect keeps a stream to the control plane until the sidecar is closed.
func (s *simulated) connect() {
	s.ended.Go(func() {
		for s.ctx.Err() == nil {
			_ = s.stream(s.ctx) // the next one follows
			select {
			case <-s.ctx.Done():
			case <-time.After(50*time.Millisecond + rand.N(100*time.Millisecond)): // about agent/relay's first wait
			}
		}
	})
}

func (s *simulated) close() {
	s.stop()
	s.ended.Wait()
}

// stream is one connection, made and used as agent/relay does.
func (s *simulated) stream(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	config := tlsconfig.MTLSClientConfig(s.source, s.source, tlsconfig.AuthorizeID(identity.ControlPlane(trustDomain)))
	config.MinVersion = tls.VersionTLS13
	conn, err := grpc.NewClient("passthrough:///"+s.address, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithDisableServiceConfig(),
		grpc.WithPerRPCCredentials(attest.Bearer(func() (string, error) { return tokenOf(s.pod), nil })), grpc.WithNoProxy(),
		grpc.WithStatsHandler(counter{s}), grpc.WithReadBufferSize(8<<10), grpc.WithWriteBufferSize(8<<10),
		grpc.WithStaticStreamWindowSize(1<<20), grpc.WithStaticConnWindowSize(1<<20))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // nothing is lost with it
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		return err
	}
	for _, req := range s.subscriptions() {
		if err := stream.Send(req); err != nil {
			return err
		}
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		s.take(resp)
		if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce}); err != nil {
			return err
		}
	}
}

// subscriptions are the first requests of a stream, with what is held.
func (s *simulated) subscriptions() []*discoveryv3.DeltaDiscoveryRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answered = map[string]bool{}
	request := func(typeURL string, subscribe ...string) *discoveryv3.DeltaDiscoveryRequest {
		req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: subscribe, InitialResourceVersions: map[string]string{}}
		for k, v := range s.held {
			if k.typeURL == typeURL && v != "" {
				req.InitialResourceVersions[k.name] = v
			}
		}
		return req
	}
	return []*discoveryv3.DeltaDiscoveryRequest{
		request(names.TypeNetwork, names.Network),
		request(names.TypeVerdicts, names.Verdicts),
		request(names.TypePackets, names.Packets),
		request(server.ClusterType, append([]string{"*"}, s.pod.uses...)...),
		request(server.ListenerType, "*"),
		request(server.ExtensionType, names.RBAC),
	}
}

func (s *simulated) take(resp *discoveryv3.DeltaDiscoveryResponse) {
	now := clock()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range resp.Resources {
		s.held[resourceKey{resp.TypeUrl, r.Name}] = r.Version
	}
	for _, name := range resp.RemovedResources {
		s.held[resourceKey{resp.TypeUrl, name}] = ""
	}
	if len(resp.Resources)+len(resp.RemovedResources) > 0 {
		s.pushes++
	}
	s.answered[resp.TypeUrl] = true
	s.moved = now
	s.check(now)
}

// expect has the sidecar say when it holds something. What was counted before is forgotten.
func (s *simulated) expect(want versions, arrived chan<- arrival) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pushes, s.bytes = 0, 0
	s.await, s.arrived, s.anew = want, arrived, false
	s.check(s.moved)
}

// expectAgain has the sidecar say when a stream that begins from now on has told it all: then both wildcards are answered, if only with nothing.
func (s *simulated) expectAgain(want versions, arrived chan<- arrival) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pushes, s.bytes = 0, 0
	s.await, s.arrived, s.anew = want, arrived, true
	s.answered = map[string]bool{}
}

func (s *simulated) check(now time.Duration) {
	if s.await == nil || s.anew && (!s.answered[server.ClusterType] || !s.answered[server.ListenerType]) {
		return
	}
	for k, v := range s.await {
		if s.held[k] != v {
			return
		}
	}
	s.await = nil
	s.arrived <- arrival{s.pod.key(), now}
}

// wrong lists what the sidecar holds that it should not, and the other way round.
func (s *simulated) wrong(want versions) []resourceKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := maps.Clone(want)
	maps.Copy(all, s.held)
	var out []resourceKey
	for k := range all {
		if s.held[k] != want[k] {
			out = append(out, k)
		}
	}
	slices.SortFunc(out, func(a, b resourceKey) int {
		if a.typeURL < b.typeURL || a.typeURL == b.typeURL && a.name < b.name {
			return -1
		}
		return 1
	})
	return out
}

// counter counts what a connection brings.
type counter struct{ *simulated }

func (c counter) HandleRPC(_ context.Context, event stats.RPCStats) {
	if in, ok := event.(*stats.InPayload); ok {
		c.mu.Lock()
		c.bytes += int64(in.WireLength)
		c.mu.Unlock()
	}
}

func (counter) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (counter) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (counter) HandleConn(context.Context, stats.ConnStats)                       {}

func (s *simulated) counts() (pushes int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pushes, s.bytes
}
