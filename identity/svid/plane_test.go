package svid

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/test/bufconn"

	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/identity/signing"
)

var (
	td  = spiffeid.RequireTrustDomainFromString("mantlet.local")
	pod = attest.Pod{Namespace: "shop", Name: "web-0", UID: "u1"}
)

const address = "control-plane.example:15010"

// plane is a real control plane's gRPC server, in memory, so that its clock and network are the test's.
type plane struct {
	t      *testing.T
	ca     *ca.CA
	minter *attest.Minter
	tokens atomic.Int64 // how often the token was asked for
	dials  dials
	log    lockedBuffer

	mu     sync.Mutex
	listen *bufconn.Listener // nil: down
}

// dials are the times at which the control plane was dialled.
type dials struct {
	mu    sync.Mutex
	times []time.Time
}

func (d *dials) add() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.times = append(d.times, time.Now())
}

func (d *dials) all() []time.Time {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]time.Time(nil), d.times...)
}

func newPlane(t *testing.T) *plane {
	t.Helper()
	return &plane{t: t, ca: newCA(t), minter: attest.NewMinter(attest.MinterConfig{TTL: 100 * time.Hour})}
}

func newCA(t *testing.T) *ca.CA {
	t.Helper()
	a, err := ca.New(ca.Config{TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func shopID(attest.Pod) (spiffeid.ID, error) {
	return identity.NewNamer(td, nil).ID(identity.Workload{Namespace: "shop", ServiceAccount: "web"})
}

// up serves signer, presenting an SVID of its own, until the returned function is called.
func (p *plane) up(own x509svid.Source, signer *ca.CA) (down func()) {
	l := bufconn.Listen(1 << 16)
	p.mu.Lock()
	p.listen = l
	p.mu.Unlock()
	stop := p.serve(l, own, signer)
	return func() {
		p.mu.Lock()
		p.listen = nil
		p.mu.Unlock()
		stop()
	}
}

func (p *plane) serve(l net.Listener, own x509svid.Source, signer *ca.CA) (stop func()) {
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(signing.ServerTLS(own, signer))))
	signing.New(p.minter, shopID, signer, slog.New(slog.DiscardHandler)).Register(g)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	return func() {
		g.Stop()
		<-done
	}
}

func (p *plane) server(a *ca.CA) x509svid.Source {
	p.t.Helper()
	s, err := a.NewServer(nil, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

func (p *plane) dial(ctx context.Context, addr string) (net.Conn, error) {
	p.dials.add()
	if addr != address {
		return nil, errors.New("dialled " + addr)
	}
	p.mu.Lock()
	l := p.listen
	p.mu.Unlock()
	if l == nil {
		return nil, errors.New("connection refused")
	}
	return l.DialContext(ctx)
}

func (p *plane) config() BuiltinConfig {
	return BuiltinConfig{
		Address:     address,
		TrustDomain: td,
		Bundle:      p.ca.Bundle(),
		DialContext: p.dial,
		Log:         slog.New(slog.NewTextHandler(&p.log, nil)),
		Token: func() (string, error) {
			p.tokens.Add(1)
			token, _, err := p.minter.Mint(pod, attest.Audience)
			return token, err
		},
	}
}

// run starts a Builtin that ends with the returned function.
func (p *plane) run(cfg BuiltinConfig) (b *Builtin, stop func()) {
	p.t.Helper()
	b, err := NewBuiltin(cfg)
	if err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	return b, func() {
		cancel()
		if err := <-done; err != nil {
			p.t.Errorf("Run: %v", err)
		}
	}
}

// bubble runs a test on a fake clock. Goroutines that outlive the test fail it.
func bubble(t *testing.T, f func(t *testing.T, p *plane)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newPlane(t)) })
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
