package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mantlet/mantlet/agent/flows"
)

// keptFlows bounds the records that wait to be asked for: whoever runs for long has connections that nobody asks about.
const keptFlows = 4096

// flowLog takes the flow records that an agent writes, JSON lines, and keeps those of the last connections that came about.
type flowLog struct {
	mu      sync.Mutex
	partial []byte
	kept    map[onward]flows.Record
	order   []onward       // of kept, oldest first; some are gone
	changed chan struct{}  // closed at the next record
	revoked []flows.Record // the last mostRevoked of connections that were cut, oldest first
	err     error
}

// onward is the sidecar's own connection, by which its other end knows it: to the app, whose port alone counts, or to another pod.
type onward struct {
	from, to netip.AddrPort
}

// toApp is what an app sees: the sidecar's own address, which may lead to several of the pod's ports at once, and the port.
func toApp(from netip.AddrPort, port uint16) onward {
	return onward{unmap(from), netip.AddrPortFrom(netip.Addr{}, port)}
}

func toPeer(from, to netip.AddrPort) onward { return onward{unmap(from), unmap(to)} }

// mostRevoked bounds what is kept of connections that were cut.
const mostRevoked = 1000

func newFlowLog() *flowLog {
	return &flowLog{kept: map[onward]flows.Record{}, changed: make(chan struct{})}
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
		if r.Verdict == flows.Revoked {
			f.revoked = append(f.revoked, r)
			f.revoked = f.revoked[max(0, len(f.revoked)-mostRevoked):]
			continue
		}
		switch {
		case !r.UpstreamLocal.IsValid():
		case r.Direction == flows.Inbound:
			f.keep(toApp(r.UpstreamLocal, r.UpstreamRemote.Port()), r)
		default:
			f.keep(toPeer(r.UpstreamLocal, r.UpstreamRemote), r)
		}
	}
	close(f.changed)
	f.changed = make(chan struct{})
	return len(b), nil
}

func (f *flowLog) keep(c onward, r flows.Record) {
	f.kept[c] = r
	f.order = append(f.order, c)
	if len(f.order) >= 2*keptFlows {
		for _, old := range f.order[:keptFlows] {
			if !slices.Contains(f.order[keptFlows:], old) { // a port comes again
				delete(f.kept, old)
			}
		}
		f.order = append(f.order[:0], f.order[keptFlows:]...)
	}
}

// wait returns the record of a connection. A record is used once: ports come again.
func (f *flowLog) wait(ctx context.Context, c onward) (flows.Record, error) {
	for {
		f.mu.Lock()
		r, ok := f.kept[c]
		delete(f.kept, c)
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

const (
	// renumbered is when another connection is looked for, as the one asked for may have another source port. Far longer than records take.
	renumbered = 3 * time.Second
	// recent bounds how old that may be.
	recent = 30 * time.Second
)

// waitToPeer returns the record of the pod's own connection to another pod, by its ends as that one knows them. Where two connections of a pod have one source
// port, to two ports of the other pod, that one's redirect leads both to one port, and the kernel gives the second another source port
// (nf_nat: what comes back has to be told apart). Then it is the newest to the same destination that nobody has asked for.
func (f *flowLog) waitToPeer(ctx context.Context, from, to netip.AddrPort) (flows.Record, error) {
	exactly, cancel := context.WithTimeout(ctx, renumbered)
	defer cancel()
	r, err := f.wait(exactly, toPeer(from, to))
	if err == nil || exactly.Err() == nil || ctx.Err() != nil {
		return r, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range slices.Backward(f.order) {
		if other, ok := f.kept[c]; ok && c.to == unmap(to) && c.from.Addr() == unmap(from).Addr() && time.Since(other.Time) < recent {
			delete(f.kept, c)
			return other, nil
		}
	}
	return r, err
}

// findRevoked returns the newest record of a connection that was cut for which is holds.
func (f *flowLog) findRevoked(is func(*flows.Record) bool) (flows.Record, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range slices.Backward(f.revoked) {
		if is(&r) {
			return r, true
		}
	}
	return flows.Record{}, false
}

func (f *flowLog) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }
