package relay

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	serviceName = "envoy.service.discovery.v3.AggregatedDiscoveryService"
	methodDelta = "DeltaAggregatedResources"

	pauseFirst = 100 * time.Millisecond // before the second attempt at a control plane; doubled with each that follows
	pauseMax   = 5 * time.Second
)

// Relay is the aggregated discovery service on the agent's socket. One stream is carried at a time: a new one ends the one before
// it, which can only be that of an Envoy that has gone.
type Relay struct {
	upstream grpc.ClientConnInterface
	ready    <-chan struct{}
	logger   *slog.Logger
	ledger   *Ledger
	own      map[string]*own // by type URL; all else is for Envoy

	closed context.Context // ended by Close
	close  context.CancelFunc
	wg     sync.WaitGroup // of both ways of streams: they outlive their handler for a moment

	turn chan struct{} // held by the stream that is carried

	mu       sync.Mutex
	displace context.CancelFunc // ends the stream that is carried
	failures int                // streams in a row that ended before the control plane answered
	trouble  string             // why there is no stream to the control plane; empty: there is one, or none was asked for
}

// New returns a relay to the control plane that upstream reaches ([Upstream.Connect]). It calls there only after ready is closed:
// when there is an SVID to show.
func New(upstream grpc.ClientConnInterface, ready <-chan struct{}, logger *slog.Logger) *Relay {
	r := &Relay{upstream: upstream, ready: ready, logger: logger, ledger: newLedger(logger), own: map[string]*own{}, turn: make(chan struct{}, 1)}
	r.closed, r.close = context.WithCancel(context.Background())
	return r
}

// Ledger tells what Envoy holds.
func (r *Relay) Ledger() *Ledger { return r.ledger }

// Trouble says why the control plane gives no configuration, or is empty where it does.
func (r *Relay) Trouble() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.trouble
}

// Register adds the service to a gRPC server that was made with [Codec].
func (r *Relay) Register(g *grpc.Server) {
	g.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName,
		HandlerType: (*any)(nil),
		Streams: []grpc.StreamDesc{{
			StreamName: methodDelta, ClientStreams: true, ServerStreams: true,
			Handler: func(_ any, down grpc.ServerStream) error { return r.carry(down) },
		}},
	}, r)
}

// Close ends all streams, now and later ones, and waits for what belongs to them.
func (r *Relay) Close() {
	r.close()
	r.turn <- struct{}{} // the last stream has ended
	<-r.turn
	r.wg.Wait()
}

var errEnvoyEnded = errors.New("envoy ended its stream")

// carry is the handler of Envoy's stream.
func (r *Relay) carry(down grpc.ServerStream) error {
	ctx, cancel := context.WithCancel(down.Context())
	defer cancel()
	defer context.AfterFunc(r.closed, cancel)()
	if err := r.takeTurn(ctx, cancel); err != nil {
		return status.Error(codes.Unavailable, "displaced by a newer stream, or the agent is stopping")
	}
	defer func() { <-r.turn }()
	session := r.ledger.stream()
	for _, o := range r.own {
		o.begin(session)
	}

	up, err := r.open(ctx)
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	r.logger.Info("relay: connected to the control plane")
	err = r.pump(ctx, cancel, session, up, down)
	switch {
	case r.closed.Err() != nil:
		err = errors.New("the agent is stopping")
	case down.Context().Err() != nil, errors.Is(err, errEnvoyEnded):
		r.logger.Info("relay: envoy's stream ended")
	case errors.Is(err, context.Canceled):
		err = errors.New("displaced by a newer stream")
	default:
		r.note(err)
		r.logger.Warn("relay: lost the control plane; envoy keeps what it has", "error", err)
	}
	return status.Error(codes.Unavailable, err.Error())
}

// takeTurn ends the stream that is carried and waits until it has ended.
func (r *Relay) takeTurn(ctx context.Context, cancel context.CancelFunc) error {
	r.mu.Lock()
	before := r.displace
	r.displace = cancel
	r.mu.Unlock()
	if before != nil {
		before()
	}
	select {
	case r.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// open opens the control plane's side, as often and as patiently as it takes.
func (r *Relay) open(ctx context.Context) (grpc.ClientStream, error) {
	select {
	case <-r.ready:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	desc := &grpc.StreamDesc{StreamName: methodDelta, ClientStreams: true, ServerStreams: true}
	for {
		if err := r.pause(ctx); err != nil {
			return nil, err
		}
		up, err := r.upstream.NewStream(ctx, desc, "/"+serviceName+"/"+methodDelta)
		if err == nil {
			return up, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		r.note(err)
		r.logger.Warn("relay: cannot reach the control plane", "error", err)
	}
}

// note counts a failure and keeps its reason.
func (r *Relay) note(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures++
	r.trouble = "control plane: " + err.Error()
}

// answered ends a row of failures.
func (r *Relay) answered() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failures, r.trouble = 0, ""
}

// pause waits as long as the failures in a row ask for, with a quarter of jitter: many sidecars lose a control plane at once.
func (r *Relay) pause(ctx context.Context) error {
	r.mu.Lock()
	n := r.failures
	r.mu.Unlock()
	if n == 0 {
		return ctx.Err()
	}
	d := min(pauseFirst<<min(n-1, 10), pauseMax)
	timer := time.NewTimer(d + time.Duration(rand.Int64N(int64(d)/2)) - d/4)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pump carries messages both ways until a side ends, a rule is broken or ctx ends; the error says which.
func (r *Relay) pump(ctx context.Context, cancel context.CancelFunc, s *session, up grpc.ClientStream, down grpc.ServerStream) error {
	defer cancel() // ends the control plane's side; Envoy's ends when the handler returns, and with it what is blocked there
	fromEnvoy, fromUpstream := make(chan error, 1), make(chan error, 1)
	to := &requester{up: up}
	r.wg.Go(func() { fromEnvoy <- r.requests(s, to, down) })
	r.wg.Go(func() { fromUpstream <- r.responses(s, up, to, down) })
	for {
		select {
		case err := <-fromEnvoy:
			if err != nil {
				return err
			}
			fromEnvoy = nil // the control plane takes no more: the other way tells why
		case err := <-fromUpstream:
			if errors.Is(err, io.EOF) {
				err = errors.New("the control plane ended the stream")
			}
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// requests carries what Envoy asks, and after its first request, which says whose stream it is, what the agent asks. It returns nil
// where the control plane's stream has ended.
func (r *Relay) requests(s *session, to *requester, down grpc.ServerStream) error {
	asked := false
	for {
		f := new(frame)
		if err := down.RecvMsg(f); err != nil {
			return errEnvoyEnded
		}
		req, err := parseRequest(f.bytes)
		if err != nil {
			return err
		}
		s.request(req)
		messages := [][]byte{f.bytes}
		if !asked {
			asked = true
			messages = append(messages, r.subscriptions()...)
		}
		for _, m := range messages {
			if err := to.send(m); err != nil {
				return nil //nolint:nilerr // responses learns from the same stream how it ended
			}
		}
	}
}

// responses carries what the control plane answers, and takes out what is for the agent.
func (r *Relay) responses(s *session, up grpc.ClientStream, to *requester, down grpc.ServerStream) error {
	for {
		f := new(frame)
		if err := up.RecvMsg(f); err != nil {
			return err
		}
		resp, err := parseResponse(f.bytes)
		if err != nil {
			return err
		}
		if own := r.own[resp.typeURL]; own != nil {
			if resp.nonce == "" {
				return errNoNonce
			}
			r.answered()
			if answer := own.take(s, resp, f.bytes); answer != nil {
				_ = to.send(answer) // where the stream has ended, the next RecvMsg says how
			}
			continue
		}
		if err := s.response(resp); err != nil {
			return err
		}
		r.answered()
		if err := down.SendMsg(f); err != nil {
			return err
		}
	}
}
