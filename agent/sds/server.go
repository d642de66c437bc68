// Package sds serves a workload's X.509-SVID and trust bundle to its own Envoy (secret discovery service, xDS v3).
//
//	svid.Source ──Updated──► stream: what is subscribed and not yet sent in this version ──► Envoy
//	                            ▲                                                              │
//	                            └──────────── subscriptions, ACK, NACK (logged) ◄──────────────┘
//
// Two secrets exist, named by xds/names: "workload" (certificate chain and key) and "bundle" (Envoy's SPIFFE validator with the
// roots of the trust domain). Register the server only on a socket that nobody but the pod's Envoy can reach: it gives away the
// private key.
//
// Envoy resumes TLS sessions, and asks neither for the certificate nor for its expiry then. Nothing in Envoy bounds that, but the keys of
// session tickets live no longer than the TLS context, and that is made anew when the secret's bytes change. So they change with each
// period of [SessionBound], whether or not the certificate does and whether or not it can be renewed: a session is
// resumed for no longer than that, and by nobody later than that after the expiry of his certificate.
package sds

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mantlet/mantlet/identity/svid"
)

// typeURL is the type of every resource here.
const typeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// Server is the secret discovery service. FetchSecrets (REST polling) is not implemented.
type Server struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer

	source svid.Source
	bound  time.Duration
	began  time.Time
	log    *slog.Logger
	closed chan struct{}
	once   sync.Once

	mu      sync.Mutex
	held    spiffeid.ID   // of the certificate that Envoy accepted last; zero: none
	changed chan struct{} // closed when held changes
}

// SessionBound is how long TLS sessions can be resumed, unless the configuration says otherwise.
const SessionBound = 10 * time.Minute

// New returns a Server for one workload's source. No TLS session with Envoy is resumed for longer than bound; zero: SessionBound.
func New(source svid.Source, bound time.Duration, log *slog.Logger) *Server {
	if bound <= 0 {
		bound = SessionBound
	}
	return &Server{source: source, bound: bound, began: time.Now(), log: log, closed: make(chan struct{}), changed: make(chan struct{})}
}

// epoch numbers the periods of the length of the bound, and says when the present one ends.
func (s *Server) epoch() (number int64, left time.Duration) {
	since := time.Since(s.began)
	return int64(since / s.bound), s.bound - since%s.bound
}

// Held returns the identity of the certificate that Envoy accepted last, and a channel that is closed when it is another.
func (s *Server) Held() (id spiffeid.ID, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.held, s.changed
}

func (s *Server) accepted(id spiffeid.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id.IsZero() || id == s.held {
		return
	}
	s.held = id
	close(s.changed)
	s.changed = make(chan struct{})
}

// Register adds the service to a gRPC server.
func (s *Server) Register(g *grpc.Server) { secretv3.RegisterSecretDiscoveryServiceServer(g, s) }

// Close ends all streams, now and later ones; call it before grpc.Server.GracefulStop, which waits for them.
func (s *Server) Close() { s.once.Do(func() { close(s.closed) }) }

// StreamSecrets implements the state-of-the-world variant.
func (s *Server) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	return serve(s, &worldStream{log: s.log, accepted: s.accepted, send: stream.Send}, stream.Recv, stream)
}

// DeltaSecrets implements the incremental variant.
func (s *Server) DeltaSecrets(stream secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	return serve(s, &deltaStream{log: s.log, accepted: s.accepted, send: stream.Send}, stream.Recv, stream)
}

// variant is one stream's side of the protocol: it remembers subscriptions and what was sent.
type variant[Req any] interface {
	receive(Req) error
	// push sends what is subscribed and not yet sent; have is empty while there is no valid SVID.
	push(have map[string]secret) error
}

// serve runs one stream until the client ends it or the Server is closed.
func serve[Req any](s *Server, v variant[Req], recv func() (Req, error), stream grpc.ServerStream) error {
	requests, failed := make(chan Req), make(chan error, 1)
	go func() { // ends with the stream's context, which ends when serve returns
		for {
			req, err := recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- req:
			case <-stream.Context().Done():
				return
			}
		}
	}()
	waiting := false
	var last *material // that there were secrets of
	for {
		updated := s.source.Updated() // before reading, so that no change falls in between
		epoch, left := s.epoch()
		m, have, err := offer(s.source, last, epoch)
		switch {
		case err != nil && !waiting:
			s.log.Warn("no valid secrets to serve; Envoy waits, or stays with what it has", "reason", err)
			waiting = true
		case err == nil:
			waiting = false
		}
		last = m
		if err := v.push(have); err != nil {
			return err
		}
		next := time.NewTimer(left)
		select {
		case <-s.closed:
			return status.Error(codes.Unavailable, "the agent is shutting down")
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		case err := <-failed:
			if errors.Is(err, io.EOF) { // the client has nothing more to say, and so have we
				return nil
			}
			return err
		case <-updated:
		case <-next.C:
		case req := <-requests:
			if err := v.receive(req); err != nil {
				return err
			}
		}
		next.Stop()
	}
}

// checkType refuses a request for another type of resource; an empty one is this service's own.
func checkType(url string) error {
	if url != "" && url != typeURL {
		return status.Error(codes.InvalidArgument, fmt.Sprintf("this service has resources of type %s only, not %s", typeURL, url))
	}
	return nil
}

// logNACK reports that Envoy keeps what it had. The same bytes are not sent again: they would be refused again.
func logNACK(log *slog.Logger, sent map[string]string, reason string) {
	log.Error("Envoy refused secrets and keeps the previous ones", "secrets", sent, "reason", reason)
}
