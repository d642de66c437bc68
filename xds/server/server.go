package server

import (
	"context"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Server serves delta ADS. Make it with New. All methods may be called concurrently.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer
	cfg    Config
	index  index
	totals totals

	mu      sync.RWMutex
	clients map[Client]*client
	refuse  error          // non-nil: no new streams
	running sync.WaitGroup // goroutines of streams
}

// New makes a Server. It panics without an Authenticator.
func New(cfg Config) *Server {
	return &Server{cfg: cfg.withDefaults(), clients: map[Client]*client{}}
}

// Register adds the discovery service to a gRPC server, which should have been made with ServerOptions.
func (s *Server) Register(g *grpc.Server) { discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s) }

// Publish sets all that a client should hold, apart from what it asks for on demand. Only the differences are sent; where the
// bytes are the same nothing is. It never waits for the client, and may come before the client connects: until the first
// Publish for it, a client is answered nothing at all, lest a control plane that has only just started tear down what is in
// force. It reports whether anything differs from before.
func (s *Server) Publish(name Client, set Set) (different bool) {
	for {
		different, known := s.obtain(name).publish(set, s.cfg.Now())
		if known {
			return different
		}
	}
}

// Refresh has on-demand names resolved again, those that the client is subscribed to; what has changed is sent.
func (s *Server) Refresh(name Client, names ...string) {
	if c := s.lookup(name); c != nil {
		c.refresh(names)
	}
}

// Forget drops a client whose pod is gone, and ends its stream.
func (s *Server) Forget(name Client) {
	s.mu.Lock()
	c := s.clients[name]
	delete(s.clients, name)
	s.mu.Unlock()
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgotten = true
	c.moved()
	if c.stream != nil {
		c.stream.end(status.Errorf(codes.PermissionDenied, "the pod %s is gone", name))
	}
}

// Drain refuses new streams and ends the present ones one by one, spread evenly over a time, so that the sidecars find
// another replica without all arriving there at once. It returns early with the context's error.
func (s *Server) Drain(ctx context.Context, over time.Duration) error {
	gone := status.Error(codes.Unavailable, "this control plane replica is going away: connect again")
	s.mu.Lock()
	if s.refuse == nil {
		s.refuse = gone
	}
	var streams []*stream
	for _, c := range s.clients {
		c.mu.Lock()
		if c.stream != nil {
			streams = append(streams, c.stream)
		}
		c.mu.Unlock()
	}
	s.mu.Unlock()
	if len(streams) == 0 {
		return nil
	}
	pause := time.NewTicker(max(over/time.Duration(len(streams)), time.Microsecond))
	defer pause.Stop()
	for _, st := range streams {
		st.end(gone)
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-pause.C:
		}
	}
	return nil
}

// Close refuses new streams, ends all, and returns when their goroutines have.
func (s *Server) Close() {
	closed := status.Error(codes.Unavailable, "the control plane is shutting down: connect again")
	s.mu.Lock()
	s.refuse = closed
	for _, c := range s.clients {
		c.mu.Lock()
		if c.stream != nil {
			c.stream.end(closed)
		}
		c.mu.Unlock()
	}
	s.mu.Unlock()
	s.running.Wait()
}

func (s *Server) lookup(name Client) *client {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.clients[name]
}

func (s *Server) obtain(name Client) *client {
	if c := s.lookup(name); c != nil {
		return c
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.clients[name]
	if c == nil {
		c = newClient(name)
		s.clients[name] = c
	}
	return c
}

// attach makes a stream the one of its client. An older one is ended: after a broken connection the new stream may arrive
// before the old one is known to be dead.
func (s *Server) attach(ctx context.Context, name Client, st *stream) error {
	for {
		c := s.obtain(name)
		s.mu.RLock()
		c.mu.Lock()
		if err := s.refuse; err != nil {
			c.mu.Unlock()
			s.mu.RUnlock()
			s.drop(c)
			return err
		}
		if c.forgotten {
			c.mu.Unlock()
			s.mu.RUnlock()
			continue
		}
		if err := ctx.Err(); err != nil { // two came at once, and the older one last: it must not replace the living
			c.mu.Unlock()
			s.mu.RUnlock()
			s.drop(c)
			return err
		}
		var released []string
		old := c.stream
		if old != nil {
			released = s.reset(c)
			old.end(status.Errorf(codes.Aborted, "replaced by a newer stream of %s", name))
		}
		st.client, c.stream, c.connectedAt = c, st, s.cfg.Now()
		published := c.published
		s.running.Add(2)
		c.mu.Unlock()
		s.mu.RUnlock()
		if len(released) > 0 {
			s.cfg.OnUnsubscribe(name, released)
		}
		s.cfg.Log.Info("sidecar connected", "client", name, "replaces_older_stream", old != nil)
		if !published {
			s.cfg.Log.Info("sidecar waits for its first configuration: nothing was published for it yet", "client", name)
		}
		return nil
	}
}

// detach ends what a stream was to its client, unless a newer one took its place.
func (s *Server) detach(st *stream) {
	c := st.client
	c.mu.Lock()
	if st.retry != nil {
		st.retry.Stop()
	}
	var released []string
	if c.stream == st {
		released = s.reset(c)
		c.stream = nil
		c.moved()
	}
	c.mu.Unlock()
	if len(released) > 0 {
		s.cfg.OnUnsubscribe(c.name, released)
	}
	s.drop(c)
}

// drop removes a client that nobody published anything for and that is not connected.
func (s *Server) drop(c *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.published && c.stream == nil && !c.forgotten {
		c.forgotten = true
		delete(s.clients, c.name)
	}
}

// reset forgets what only its stream made true of a client, and returns the on-demand names that it was subscribed to. What
// the client last said that it holds stays in the ledger, unconfirmed.
func (s *Server) reset(c *client) (released []string) {
	for _, ts := range c.types {
		for name, e := range ts.entries {
			if e.explicit && ts.url == ClusterType {
				s.index.remove(name, c.name)
				if e.static == nil {
					released = append(released, name)
				}
			}
			removed := e.static == nil && (e.explicit || e.acked == "") // else: its removal is not confirmed yet
			e.explicit, e.due, e.alone, e.held, e.flight, e.confirmed = false, false, false, "", nil, 0
			e.demanded, e.stale = nil, false
			if removed {
				e.gone = true
				delete(ts.entries, name)
			}
		}
		ts.pending = nil
		ts.asked, ts.wildcard, ts.answerDue, ts.refused = false, false, false, nil
	}
	c.explicit = 0
	return released
}
