package flows

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"

	servicev3 "github.com/envoyproxy/go-control-plane/envoy/service/accesslog/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/mantlet/mantlet/xds/names"
)

const (
	// queueLength is how many records may wait for the writer: about 2 MB.
	queueLength = 4096
	// reportEvery keeps a writer that is too slow from filling the log instead.
	reportEvery = 10 * time.Second
)

// Receiver is Envoy's access log service.
type Receiver struct {
	servicev3.UnimplementedAccessLogServiceServer

	out      *json.Encoder
	self     func() string
	logger   *slog.Logger
	queue    chan Record
	now      func() time.Time
	observer Observer // nil: nobody asks

	mu       sync.Mutex
	dropped  uint64 // since the last report
	total    uint64
	reported time.Time
}

// New returns a receiver that writes to out, one Write for each record. self gives the pod's own SPIFFE ID, or "" while it has none.
func New(out io.Writer, self func() string, logger *slog.Logger) *Receiver {
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	return &Receiver{out: enc, self: self, logger: logger, queue: make(chan Record, queueLength), now: time.Now}
}

// Register adds the service to a gRPC server.
func (r *Receiver) Register(g *grpc.Server) { servicev3.RegisterAccessLogServiceServer(g, r) }

// Dropped is how many records were lost so far, because the writer was too slow or failed.
func (r *Receiver) Dropped() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.total
}

// Run writes records until ctx ends, then those that wait, and returns. It returns late if the writer blocks.
func (r *Receiver) Run(ctx context.Context) {
	for {
		select {
		case rec := <-r.queue:
			r.write(rec)
		case <-ctx.Done():
			for {
				select {
				case rec := <-r.queue:
					r.write(rec)
				default:
					r.report()
					return
				}
			}
		}
	}
}

func (r *Receiver) write(rec Record) {
	if err := r.out.Encode(rec); err != nil {
		r.drop(err.Error())
	}
}

// StreamAccessLogs implements the service. Envoy opens one stream for each log and worker and names the log in its first message.
func (r *Receiver) StreamAccessLogs(stream servicev3.AccessLogService_StreamAccessLogsServer) error {
	log := ""
	var ends []End // of one message
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&servicev3.StreamAccessLogsResponse{})
		}
		if err != nil {
			return err
		}
		if id := m.GetIdentifier(); id != nil {
			log = id.GetLogName()
		}
		switch log {
		case names.LogOpen:
			for _, e := range m.GetTcpLogs().GetLogEntry() {
				r.observe(e)
			}
			continue
		case names.LogGate, names.LogInbound, names.LogOutbound:
		default:
			return status.Error(codes.InvalidArgument, fmt.Sprintf("no access log is named %q", log))
		}
		self := r.self()
		ends = ends[:0]
		for _, e := range m.GetTcpLogs().GetLogEntry() {
			if rec, ok := recordOf(log, self, e); ok {
				ends = appendEnd(ends, &rec)
				r.Add(rec)
			}
		}
		if len(ends) > 0 && r.observer != nil {
			r.observer.Closed(ends)
		}
	}
}

// Add writes a record down, or drops it when too many wait already.
func (r *Receiver) Add(rec Record) {
	select {
	case r.queue <- rec:
	default:
		r.drop("the writer is too slow")
	}
}

// drop counts a lost record and says so, but not each time.
func (r *Receiver) drop(why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dropped++
	r.total++
	if now := r.now(); now.Sub(r.reported) >= reportEvery {
		r.reported = now
		r.logger.Error("flows: records lost", "count", r.dropped, "total", r.total, "reason", why)
		r.dropped = 0
	}
}

// report tells of losses that drop has not told of.
func (r *Receiver) report() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.dropped > 0 {
		r.logger.Error("flows: records lost", "count", r.dropped, "total", r.total)
		r.dropped = 0
	}
}
