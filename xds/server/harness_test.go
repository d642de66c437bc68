package server_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mantlet/mantlet/xds/server"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// clientKey is the metadata in which clients of the tests name themselves.
const clientKey = "x-test-client"

type byMetadata struct{}

func (byMetadata) Authenticate(ctx context.Context) (server.Client, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(clientKey); len(v) == 1 {
		return server.Client(v[0]), nil
	}
	return "", errors.New("no client in the metadata")
}

// onDemand is what exists on demand, changeable.
type onDemand struct {
	mu    sync.Mutex
	known map[string]*server.Resource
	asked []string
	gate  chan struct{} // while open, Resolve waits for it
	// blocked is told of each Resolve that waits.
	blocked chan struct{}
}

// block has Resolve wait, after it knows its answer, until the returned channel is closed.
func (o *onDemand) block() (release chan struct{}) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.gate = make(chan struct{})
	return o.gate
}

func (o *onDemand) Resolve(_ server.Client, name string) (*server.Resource, bool) {
	o.mu.Lock()
	o.asked = append(o.asked, name)
	r, ok := o.known[name]
	gate := o.gate
	o.mu.Unlock()
	if gate != nil {
		select {
		case o.blocked <- struct{}{}:
		default:
		}
		<-gate
	}
	return r, ok
}

func (o *onDemand) count() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.asked)
}

func (o *onDemand) set(name string, r *server.Resource) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.known == nil {
		o.known = map[string]*server.Resource{}
	}
	if o.known[name] = r; r == nil {
		delete(o.known, name)
	}
}

// log collects what the server logs.
type log struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *log) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// bench is a server on a real gRPC server on a unix socket.
type bench struct {
	*server.Server
	socket string
	od     *onDemand
	log    *log
	stop   func()
}

func start(t testing.TB, change func(*server.Config)) *bench {
	t.Helper()
	return startAt(t, filepath.Join(shortDir(t), "s"), change)
}

func startAt(t testing.TB, socket string, change func(*server.Config)) *bench {
	t.Helper()
	b := &bench{socket: socket, od: &onDemand{blocked: make(chan struct{}, 1)}, log: &log{}}
	cfg := server.Config{Authenticator: byMetadata{}, OnDemand: b.od, Log: slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	if change != nil {
		change(&cfg)
	}
	b.Server = server.New(cfg)
	l, err := net.Listen("unix", b.socket)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(server.ServerOptions()...)
	b.Register(g)
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	b.stop = sync.OnceFunc(func() {
		b.Close()
		g.Stop()
		<-done
	})
	t.Cleanup(func() {
		b.od.mu.Lock()
		if b.od.gate != nil {
			select {
			case <-b.od.gate:
			default:
				close(b.od.gate)
			}
		}
		b.od.mu.Unlock()
		b.stop()
		if t.Failed() {
			t.Logf("server log:\n%s", b.log)
		}
	})
	return b
}

func resource(t testing.TB, name string, m proto.Message) *server.Resource {
	t.Helper()
	r, err := server.NewResource(name, m)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func set(t testing.TB, rs ...*server.Resource) server.Set {
	t.Helper()
	s, err := server.NewSet(rs...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// within is a context for what must happen soon; it only bounds a failing test.
func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// await waits for a condition.
func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	look := time.NewTicker(2 * time.Millisecond)
	defer look.Stop()
	deadline := time.After(15 * time.Second)
	for !condition() {
		select {
		case <-look.C:
		case <-deadline:
			t.Fatalf("never: %s", what)
		}
	}
}
