package relay

import (
	"context"
	"fmt"
	"math"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// Upstream says how to reach the control plane.
type Upstream struct {
	Address     string // "host:port"
	TrustDomain spiffeid.TrustDomain
	SVID        x509svid.Source
	Bundle      x509bundle.Source
	Token       func() (string, error) // this pod's token; asked for each stream
	// DialContext opens the connection, past the pod's redirect.
	DialContext func(ctx context.Context, network, address string) (net.Conn, error)
}

// Connection leads to the control plane. Each stream gets a TLS connection of its own, which ends with the stream's context: the SVID
// that a connection was opened with expires, and is another once the pod has another identity, and then no new stream would be
// accepted on it.
type Connection struct {
	open   func() (*grpc.ClientConn, error)
	ending sync.WaitGroup
}

// NewStream implements grpc.ClientConnInterface. The context has to end.
func (c *Connection) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	conn, err := c.open()
	if err != nil {
		return nil, err
	}
	stream, err := conn.NewStream(ctx, desc, method, opts...)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	c.ending.Add(1)
	context.AfterFunc(ctx, func() {
		defer c.ending.Done()
		_ = conn.Close()
	})
	return stream, nil
}

// planeWindow is how many bytes the control plane may send ahead. It is fixed: to find a better one gRPC would answer each response with a ping, which
// costs the control plane as much as the ACK does.
const planeWindow = 1 << 20

// Invoke implements grpc.ClientConnInterface. The relay makes no such calls.
func (c *Connection) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	return status.Error(codes.Unimplemented, "streams only")
}

// Close waits until the connections of all streams are closed; their contexts must have ended.
func (c *Connection) Close() error {
	c.ending.Wait()
	return nil
}

// Connect returns the way to the control plane: mTLS with the pod's SVID, to nobody but
// spiffe://<trust domain>/mantlet/control-plane, with the pod's token in the metadata of each call. Nothing is dialled before
// the first call.
func (u Upstream) Connect() (*Connection, error) {
	server, err := spiffeid.FromSegments(u.TrustDomain, "mantlet", "control-plane")
	if err != nil {
		return nil, fmt.Errorf("control plane's identity: %w", err)
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(u.SVID, u.Bundle, tlsconfig.AuthorizeID(server)))),
		grpc.WithPerRPCCredentials(bearer{u.Token}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return u.DialContext(ctx, "tcp", address) }),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(Codec()), grpc.MaxCallRecvMsgSize(math.MaxInt32)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 5 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		grpc.WithDisableServiceConfig(),
		grpc.WithStaticStreamWindowSize(planeWindow),
		grpc.WithStaticConnWindowSize(planeWindow),
	}
	c := &Connection{open: func() (*grpc.ClientConn, error) {
		conn, err := grpc.NewClient("passthrough:///"+u.Address, options...)
		if err != nil {
			return nil, fmt.Errorf("control plane %s: %w", u.Address, err)
		}
		return conn, nil
	}}
	return c, nil
}

// bearer puts the pod's token into the metadata of a call.
type bearer struct{ token func() (string, error) }

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	t, err := b.token()
	if err != nil {
		return nil, fmt.Errorf("read the pod's token: %w", err)
	}
	return map[string]string{"authorization": "Bearer " + strings.TrimSpace(t)}, nil
}

// RequireTransportSecurity keeps the token off connections that are not encrypted.
func (bearer) RequireTransportSecurity() bool { return true }
