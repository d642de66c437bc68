package flows

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/data/accesslog/v3"
	servicev3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/mantlet/mantlet/xds/names"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// client serves r and returns a client of it.
func client(t *testing.T, r *Receiver) servicev3.AccessLogServiceClient {
	t.Helper()
	s := grpc.NewServer()
	r.Register(s)
	l := bufconn.Listen(64 << 10)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-served })
	conn, err := grpc.NewClient("passthrough:///agent", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return servicev3.NewAccessLogServiceClient(conn)
}

// message holds n entries; log names the log, "" for a message that is not a stream's first.
func message(log string, n int) *servicev3.StreamAccessLogsMessage {
	m := &servicev3.StreamAccessLogsMessage{}
	if log != "" {
		m.Identifier = &servicev3.StreamAccessLogsMessage_Identifier{LogName: log}
	}
	logs := &servicev3.StreamAccessLogsMessage_TCPAccessLogEntries{}
	for range n {
		logs.LogEntry = append(logs.LogEntry, &accesslogv3.TCPAccessLogEntry{CommonProperties: &accesslogv3.AccessLogCommon{UpstreamCluster: names.ClusterApp}})
	}
	m.LogEntries = &servicev3.StreamAccessLogsMessage_TcpLogs{TcpLogs: logs}
	return m
}

// send sends messages as one stream and returns its end.
func send(t *testing.T, c servicev3.AccessLogServiceClient, messages ...*servicev3.StreamAccessLogsMessage) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := c.StreamAccessLogs(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		if err := s.Send(m); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	_, err = s.CloseAndRecv()
	return err
}

func TestReceive(t *testing.T) {
	var out bytes.Buffer
	r := New(&out, func() string { return "spiffe://td.example/<self>" }, slog.New(slog.DiscardHandler))
	if err := send(t, client(t, r), message(names.LogGate, 2), message("", 1)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.Run(ctx) // writes what waits
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if len(lines) != 3 {
		t.Fatalf("%d lines:\n%s", len(lines), &out)
	}
	for _, line := range lines {
		var rec Record
		if err := json.Unmarshal([]byte(line), &rec); err != nil || rec.Log != names.LogGate || rec.Self != "spiffe://td.example/<self>" || !strings.Contains(line, "<self>") {
			t.Errorf("%s: %v", line, err)
		}
	}
	if r.Dropped() != 0 {
		t.Errorf("%d dropped", r.Dropped())
	}
}

func TestUnknownLogIsRefused(t *testing.T) {
	r := New(io.Discard, func() string { return "" }, slog.New(slog.DiscardHandler))
	for _, log := range []string{"", "http"} {
		if err := send(t, client(t, r), message(log, 1)); status.Code(err) != codes.InvalidArgument {
			t.Errorf("log %q: %v", log, err)
		}
	}
}

// stuck is a writer that blocks until it is freed.
type stuck struct {
	entered sync.Once
	in      chan struct{}
	free    chan struct{}
}

func (s *stuck) Write(b []byte) (int, error) {
	s.entered.Do(func() { close(s.in) })
	<-s.free
	return len(b), nil
}

// Envoy is never kept waiting; what is lost is counted and told of.
func TestSlowWriter(t *testing.T) {
	out := &stuck{in: make(chan struct{}), free: make(chan struct{})}
	var log bytes.Buffer
	r := New(out, func() string { return "" }, slog.New(slog.NewTextHandler(&log, nil)))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { r.Run(ctx); close(ended) }()
	c := client(t, r)
	if err := send(t, c, message(names.LogGate, 1)); err != nil {
		t.Fatal(err)
	}
	<-out.in // one record is being written
	for range queueLength/64 + 1 {
		if err := send(t, c, message(names.LogGate, 64)); err != nil {
			t.Fatal(err)
		}
	}
	if got := r.Dropped(); got != 64 {
		t.Errorf("%d dropped, want 64", got)
	}
	close(out.free)
	cancel()
	<-ended
	if s := log.String(); strings.Count(s, "records lost") != 2 || !strings.Contains(s, "count=1 ") || !strings.Contains(s, "count=63 ") {
		t.Errorf("log:\n%s", s)
	}
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, errors.New("disk full") }

func TestBrokenWriter(t *testing.T) {
	var log bytes.Buffer
	r := New(broken{}, func() string { return "" }, slog.New(slog.NewTextHandler(&log, nil)))
	if err := send(t, client(t, r), message(names.LogGate, 3)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	r.Run(ctx)
	if r.Dropped() != 3 || !strings.Contains(log.String(), "disk full") {
		t.Errorf("%d dropped, log:\n%s", r.Dropped(), &log)
	}
}
