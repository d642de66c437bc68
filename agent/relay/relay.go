package relay

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"

	"google.golang.org/grpc"
)

const (
	serviceName = "envoy.service.discovery.v3.AggregatedDiscoveryService"
	methodDelta = "DeltaAggregatedResources"
)

// Relay is the aggregated discovery service on the agent's socket, and the pod's client at the control plane. One stream of Envoy's is
// served at a time: a new one ends the one before it, which can only be that of an Envoy that has gone.
type Relay struct {
	upstream grpc.ClientConnInterface
	ready    <-chan struct{}
	logger   *slog.Logger
	ledger   *Ledger
	own      map[string]*own // by type URL; all else is for Envoy
	teller   *teller
	refused  func()

	machine *machine // the loop's alone
	events  chan func()

	forgetting sync.Mutex
	forgotten  []netip.AddrPort
	forget     chan struct{} // a token: forgotten has some

	closed context.Context // ended by Close
	close  context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	ended    bool   // Close was called: nothing begins any more
	failures int    // streams in a row that ended before the control plane answered
	trouble  string // why there is no stream to the control plane; empty: there is one, or none was tried for
}

// New returns a relay to the control plane that upstream reaches ([Upstream.Connect]). It calls there only after ready is closed:
// when there is an SVID to show.
func New(upstream grpc.ClientConnInterface, ready <-chan struct{}, logger *slog.Logger) *Relay {
	r := &Relay{upstream: upstream, ready: ready, logger: logger, ledger: newLedger(logger), own: map[string]*own{},
		teller: newTeller(logger), refused: func() {}, events: make(chan func()), forget: make(chan struct{}, 1)}
	r.machine = newMachine(logger, r.ledger)
	r.closed, r.close = context.WithCancel(context.Background())
	return r
}

// OnRefused has a function told each time the control plane refuses a stream for the certificate or the token that it was opened with. It is for
// before [Relay.Register].
func (r *Relay) OnRefused(tell func()) { r.refused = tell }

// Ledger tells what Envoy holds.
func (r *Relay) Ledger() *Ledger { return r.ledger }

// Trouble says why the control plane gives no configuration, or is empty where it does.
func (r *Relay) Trouble() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.trouble
}

// Register adds the service to a gRPC server that was made with [Codec], and begins to connect. [Relay.Close] has to follow.
func (r *Relay) Register(g *grpc.Server) {
	g.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName,
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{
			StreamName: methodDelta, ClientStreams: true, ServerStreams: true,
			Handler: func(_ any, down grpc.ServerStream) error { return r.serveEnvoy(down) },
		}},
	}, r)
	if r.teller.tell != nil {
		r.machine.tell = func(news map[netip.AddrPort]Verdict) { r.teller.hand(r.closed, news) }
		r.begin(func() { r.teller.run(r.closed) })
	}
	r.begin(r.loop)
	for _, o := range r.own {
		r.begin(func() { r.serveOwn(o) })
	}
	r.begin(r.keepConnected)
}

// Close ends all streams, now and later ones, and waits for what belongs to them.
func (r *Relay) Close() {
	r.mu.Lock()
	r.ended = true
	r.mu.Unlock()
	r.close()
	r.wg.Wait()
}

var errStopping = errors.New("the agent is stopping")

// begin starts a goroutine that Close waits for.
func (r *Relay) begin(what func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.ended {
		r.wg.Go(what)
	}
	return !r.ended
}

// loop is where all happens, one event after another.
func (r *Relay) loop() {
	for {
		select {
		case <-r.closed.Done():
			return
		case event := <-r.events:
			event()
		case <-r.forget:
			r.forgetting.Lock()
			dests := r.forgotten
			r.forgotten = nil
			r.forgetting.Unlock()
			r.machine.forget(dests)
		}
		r.machine.tend()
	}
}

// do has the loop do something and waits until it has; false: ctx or the relay ended first, and it may be done or not.
func (r *Relay) do(ctx context.Context, what func()) bool {
	done := make(chan struct{})
	select {
	case r.events <- func() { what(); close(done) }:
	case <-ctx.Done():
		return false
	case <-r.closed.Done():
		return false
	}
	select {
	case <-done:
		return true
	case <-r.closed.Done():
		return false
	}
}

// poke leaves one token in a channel of one place.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
