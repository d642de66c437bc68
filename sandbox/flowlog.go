package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"sync"

	"github.com/mantlet/mantlet/agent/flows"
)

// flowLog takes the flow records that an agent writes, JSON lines, and keeps those of connections that reached the app.
type flowLog struct {
	mu      sync.Mutex
	partial []byte
	byApp   map[netip.AddrPort]flows.Record // by the sidecar's own address towards the app, which is what the app sees
	changed chan struct{}                   // closed at the next record
	err     error
}

func newFlowLog() *flowLog {
	return &flowLog{byApp: map[netip.AddrPort]flows.Record{}, changed: make(chan struct{})}
}

// Write takes a piece of the stream. It never fails: a line that is no record is kept as the error of wait and close.
func (f *flowLog) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.partial = append(f.partial, b...)
	for {
		line, rest, ok := bytes.Cut(f.partial, []byte{'\n'})
		if !ok {
			break
		}
		f.partial = append([]byte(nil), rest...)
		var r flows.Record
		if err := json.Unmarshal(line, &r); err != nil {
			f.err = fmt.Errorf("flow record %q: %w", line, err)
			continue
		}
		if r.Direction == flows.Inbound && r.UpstreamLocal.IsValid() {
			f.byApp[unmap(r.UpstreamLocal)] = r
		}
	}
	close(f.changed)
	f.changed = make(chan struct{})
	return len(b), nil
}

// wait returns the record of the connection that the app saw as coming from an address. A record is used once: ports come again.
func (f *flowLog) wait(ctx context.Context, seen netip.AddrPort) (flows.Record, error) {
	seen = unmap(seen)
	for {
		f.mu.Lock()
		r, ok := f.byApp[seen]
		delete(f.byApp, seen)
		changed, err := f.changed, f.err
		f.mu.Unlock()
		switch {
		case ok:
			return r, nil
		case err != nil:
			return r, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return r, ctx.Err()
		}
	}
}

func (f *flowLog) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
