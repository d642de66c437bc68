package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

type deltaStream = grpc.BidiStreamingServer[discoveryv3.DeltaDiscoveryRequest, discoveryv3.DeltaDiscoveryResponse]

// stream is one connection of a client. What follows end is guarded by client.mu.
type stream struct {
	client *client
	id     string // prefix of the nonces: an ACK that belongs to another stream must not fit here
	server *Server
	grpc   deltaStream
	ctx    context.Context // of the stream
	end    context.CancelCauseFunc

	sending bool // there is a sender
	again   bool // it is to look once more before it ends
	retry   *time.Timer

	flights  map[string]*flight // by nonce
	sequence uint64
	types    int
}

// DeltaAggregatedResources serves one sidecar until its stream ends, is replaced, or the server does.
//
// Two goroutines: this one, which waits for the end, and one that receives. A third one sends, as long as there is something to send: idle
// ones would be a sixth of what a sidecar costs. The others end when this one returns, because gRPC then ends the stream under them.
func (s *Server) DeltaAggregatedResources(g deltaStream) error {
	name, err := s.cfg.Authenticator.Authenticate(g.Context())
	if err != nil || name == "" {
		s.cfg.Log.Warn("stream refused: not authenticated", "error", err)
		return status.Error(codes.Unauthenticated, "not authenticated: present the certificate or token of the pod")
	}
	ctx, cancel := context.WithCancelCause(g.Context())
	defer cancel(nil)
	st := &stream{
		id:      fmt.Sprintf("%08x", rand.Uint32()),
		server:  s,
		grpc:    g,
		ctx:     ctx,
		end:     cancel,
		flights: map[string]*flight{},
	}
	if err := compress(g.Context()); err != nil && g.Context().Err() == nil { // of a stream that has ended it is an error, too
		s.cfg.Log.Warn("responses go uncompressed", "client", name, "error", err)
	}
	if err := s.attach(ctx, name, st); err != nil {
		return err
	}
	defer s.running.Done()
	go func() { defer s.running.Done(); cancel(s.receive(st, g)) }()
	<-ctx.Done()
	err = context.Cause(ctx)
	s.detach(st)
	s.cfg.Log.Info("sidecar disconnected", "client", name, "reason", err)
	if _, ok := status.FromError(err); ok {
		return err
	}
	return nil // the client ended it
}

// StreamAggregatedResources refuses the state-of-the-world variant in words.
func (s *Server) StreamAggregatedResources(grpc.BidiStreamingServer[discoveryv3.DiscoveryRequest, discoveryv3.DiscoveryResponse]) error {
	return status.Error(codes.Unimplemented, "only delta xDS is served: set api_type DELTA_GRPC in ads_config")
}

func (s *Server) receive(st *stream, g deltaStream) error {
	for {
		req, err := g.Recv()
		if errors.Is(err, io.EOF) {
			return errors.New("closed by the client")
		}
		if err != nil {
			return err
		}
		out, err := s.request(st, req)
		if err != nil {
			s.cfg.Log.Error("stream ended: bad request", "client", st.client.name, "type", req.TypeUrl, "error", err)
			return err
		}
		s.report(st.client.name, req.TypeUrl, out)
	}
}

// report tells the outside what a request brought.
func (s *Server) report(name Client, typeURL string, out outcome) {
	log := s.cfg.Log.With("client", name, "type", typeURL)
	if n := out.nacked; n != nil {
		for _, resource := range n.names {
			log.Warn("resource refused by the sidecar (NACK); its previous version stays in force, and these bytes are not sent again", "resource", resource, "reason", n.reason)
		}
		if len(n.alone) > 0 {
			log.Warn("response refused by the sidecar (NACK) without naming a resource; each is sent again alone", "resources", n.alone, "reason", n.reason)
		}
		if len(n.names)+len(n.alone) == 0 {
			log.Warn("empty response refused by the sidecar (NACK)", "reason", n.reason)
		}
	}
	if len(out.refused) > 0 {
		log.Warn("subscriptions refused: too many names, or a name too long", "count", len(out.refused), "first", shorten(out.refused[0]), "limit", s.cfg.MaxSubscriptions, "length_limit", s.cfg.MaxNameLength)
	}
	if len(out.unsubscribed) > 0 {
		s.cfg.OnUnsubscribe(name, out.unsubscribed)
	}
	if len(out.subscribed) > 0 {
		s.cfg.OnSubscribe(name, out.subscribed)
	}
	s.totals.add(typeURL, out.counted)
	for _, e := range out.events {
		s.cfg.OnEvent(e)
	}
}

// wake has what is to be sent looked for. The caller holds client.mu.
func (st *stream) wake() {
	if st.sending {
		st.again = true
		return
	}
	st.sending = true
	st.server.running.Add(1) // the handler's own is still there: it leaves its client first
	go func() {
		defer st.server.running.Done()
		if err := st.server.send(st); err != nil {
			st.end(err)
		}
	}()
}

// send is the only one that writes to the stream, until there is nothing more to send. Whatever happens while it writes is coalesced into its
// next plan. After an error nobody sends any more.
func (s *Server) send(st *stream) error {
	for {
		if st.ctx.Err() != nil {
			return context.Cause(st.ctx)
		}
		s.resolve(st)
		out, retryIn := st.client.plan(st, &s.cfg)
		for _, p := range out {
			s.sending(st, p)
			if err := st.grpc.Send(p.response); err != nil {
				return err
			}
		}
		if st.sent(retryIn) {
			return nil
		}
	}
}

// sent ends a sender, unless it is to look again. retryIn is when to look without being woken; 0: not.
func (st *stream) sent(retryIn time.Duration) (done bool) {
	c := st.client
	c.mu.Lock()
	defer c.mu.Unlock()
	if retryIn > 0 && c.stream == st {
		if st.retry == nil {
			st.retry = time.AfterFunc(retryIn, st.due)
		} else {
			st.retry.Reset(retryIn)
		}
	}
	if st.again {
		st.again = false
		return false
	}
	st.sending = false
	return true
}

// due is called when something has waited for its ACK long enough.
func (st *stream) due() {
	c := st.client
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stream == st {
		st.wake()
	}
}

// sending counts and reports a response, before it is written: its ACK could overtake the report.
func (s *Server) sending(st *stream, p planned) {
	c, resp := st.client, p.response
	counted := Counters{Responses: 1, Resources: uint64(len(resp.Resources)), Removals: uint64(len(resp.RemovedResources)), Bytes: uint64(proto.Size(resp))}
	c.mu.Lock()
	c.typeState(resp.TypeUrl).counters.add(counted)
	c.mu.Unlock()
	s.totals.add(resp.TypeUrl, counted)
	for _, it := range p.flight.items {
		s.cfg.OnEvent(Event{Kind: Sent, Client: c.name, Type: resp.TypeUrl, Name: it.entry.name, Version: it.version, Published: it.wanted, Sent: p.flight.at, At: p.flight.at})
	}
}
