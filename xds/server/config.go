package server

import (
	"context"
	"log/slog"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
)

// Client is one sidecar: the authenticated pod, "namespace/name". What node.id says is never asked.
type Client string

// Authenticator names the client of a stream from its context: gRPC metadata, TLS peer. Its error goes to the log; the client
// is only told that it is not authenticated.
type Authenticator interface {
	Authenticate(ctx context.Context) (Client, error)
}

// OnDemand answers for clusters that nobody published and that a client subscribed to by name.
//
// Resolve is called without any lock of the server, from the client's sender, when the name is subscribed to (once more if it
// is again) and after each Refresh. It must be quick, and may be called for several clients at once. False: there is no such thing; the
// client is told so at once. A name that was known and is now denied should resolve to a cluster without endpoints.
type OnDemand interface {
	Resolve(client Client, name string) (*Resource, bool)
}

// Config is what a Server needs. Only Authenticator is required.
type Config struct {
	Authenticator Authenticator
	OnDemand      OnDemand         // nil: every name that was not published is unknown
	Log           *slog.Logger     // nil: nothing is logged
	Now           func() time.Time // nil: time.Now

	// MaxSubscriptions bounds the names that one client subscribes to, over all types; past it a name is refused: logged, and
	// answered as removed. Zero: 4096.
	MaxSubscriptions int
	// MaxNameLength bounds one name, in bytes. Zero: 256.
	MaxNameLength int
	// MaxResponseBytes is where a response is split. One resource is never split. Zero: 2 MiB.
	MaxResponseBytes int
	// AckPatience is how long a resource waits for the ACK of its previous version before the next one is sent regardless.
	// Zero: 5 s.
	AckPatience time.Duration

	// OnSubscribe is told of names newly subscribed to on demand. It is a hint: it may come after their Resolve, and two calls
	// may overtake each other. Who uses a name is answered by Server.Subscribers, which is true before Resolve is called.
	OnSubscribe func(Client, []string)
	// OnUnsubscribe is told of names that a client no longer uses, also because its stream ended. A hint like OnSubscribe.
	OnUnsubscribe func(Client, []string)
	// OnEvent is told of everything that is sent, ACKed or NACKed. It is called from the client's own goroutines, must not
	// block, and must not call Close.
	OnEvent func(Event)
}

func (c Config) withDefaults() Config {
	if c.Authenticator == nil {
		panic("xds server: a Config without Authenticator would serve policy to anyone")
	}
	if c.OnDemand == nil {
		c.OnDemand = nothingOnDemand{}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.MaxSubscriptions == 0 {
		c.MaxSubscriptions = 4096
	}
	if c.MaxNameLength == 0 {
		c.MaxNameLength = 256
	}
	if c.MaxResponseBytes == 0 {
		c.MaxResponseBytes = 2 << 20
	}
	if c.AckPatience == 0 {
		c.AckPatience = 5 * time.Second
	}
	if c.OnSubscribe == nil {
		c.OnSubscribe = func(Client, []string) {}
	}
	if c.OnUnsubscribe == nil {
		c.OnUnsubscribe = func(Client, []string) {}
	}
	if c.OnEvent == nil {
		c.OnEvent = func(Event) {}
	}
	return c
}

type nothingOnDemand struct{}

func (nothingOnDemand) Resolve(Client, string) (*Resource, bool) { return nil, false }

const (
	// maxTypes bounds the resource types that one stream may name; Envoy and the agent use about five.
	maxTypes = 32
	// maxFlights bounds the responses of one stream that wait for an ACK; past it nothing is sent until one comes.
	maxFlights = 256
	// MaxRequestBytes bounds one request. The longest is the first one after a reconnect: it lists a name and a version for
	// everything that the client holds.
	MaxRequestBytes = 4 << 20
	// maxStreams bounds the calls under way on one connection, before anybody knows whose it is; an agent has one stream, and one call for its
	// certificate.
	maxStreams = 16
	// window is how much a client may send ahead, on each stream and in all; its requests are short, but for the first ones after a reconnect. It is
	// fixed: to find a better one gRPC would answer every ACK with a ping.
	window = 64 << 10
	// maxHeaders bounds the metadata of a call: a token has some KiB, attest reads at most 16.
	maxHeaders = 64 << 10
)

// ServerOptions are the limits that belong to the gRPC server: request size, streams and headers of one connection, and keepalives that find a dead sidecar within
// 40 s. Responses have no limit, since a gate of 100,000 identities has 12 MB: who relays them must raise its own receive limit.
func ServerOptions() []grpc.ServerOption { //nolint:revive // Options would be read as those of New
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(MaxRequestBytes),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.ConnectionTimeout(20 * time.Second), // until the handshake is done; gRPC's default is 120 s
		// A sidecar's connection is idle nearly always, and its requests are short: 32 KiB for reading and as much for writing, which is
		// gRPC's default, would be most of what a sidecar costs. TLS has a buffer of its own to read from.
		grpc.ReadBufferSize(0),
		grpc.WriteBufferSize(8 << 10),
		grpc.StaticStreamWindowSize(window),
		grpc.StaticConnWindowSize(window),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	}
}
