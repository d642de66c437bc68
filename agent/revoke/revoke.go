package revoke

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/agent/verdicts"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// Config says what a Revoker works with. All fields are required except where they say otherwise.
type Config struct {
	Verdicts *verdicts.Holder
	// Coming reports whether newer verdicts have been received and not yet been applied.
	Coming func() bool
	// Envoy tells Envoy's own sockets from all others in the namespace: by user (ByUser), or by mark (ByMark).
	Envoy  Owner
	Record func(flows.Record) // takes down each connection that was cut
	Logger *slog.Logger
	// Destroy resets sockets for one who may not, and says of each why it failed; nil: the Revoker does it itself.
	Destroy func([]Socket) []error
}

// Revoker holds the pod's open connections and cuts those that the verdicts deny. It is a flows.Observer and safe for concurrent use.
type Revoker struct {
	cfg    Config
	kernel *sockets

	mu   sync.Mutex
	open map[ends]*connection

	strangers map[[8]byte]time.Time // sockets of Envoy's that nobody told of, by cookie: first seen. Of Run alone
}

// connection is one in the table.
type connection struct {
	flows.Connection
	id    spiffeid.ID // of the peer; zero: it has none
	odd   string      // why it cannot be judged, or ""
	told  time.Time   // when
	cut   bool        // its sockets are being destroyed
	waits bool        // it is judged again in a moment
}

// New opens the kernel's interface in the network namespace of the calling thread.
func New(cfg Config) (*Revoker, error) {
	k, err := openSockets(cfg.Destroy)
	if err != nil {
		return nil, err
	}
	return &Revoker{cfg: cfg, kernel: k, open: map[ends]*connection{}, strangers: map[[8]byte]time.Time{}}, nil
}

// Close is for when Run has ended and nothing is observed any more.
func (r *Revoker) Close() { r.kernel.close() }

// Run sweeps whenever the verdicts change, and holds the table against the kernel from time to time, until ctx ends.
func (r *Revoker) Run(ctx context.Context) {
	audit := time.NewTicker(auditEvery)
	defer audit.Stop()
	for {
		changed := r.cfg.Verdicts.Changed()
		r.sweep()
		for waiting := true; waiting; {
			select {
			case <-changed:
				waiting = false
			case <-audit.C:
				r.audit()
			case <-ctx.Done():
				return
			}
		}
	}
}

// Opened implements flows.Observer: the connection is judged at once.
func (r *Revoker) Opened(c flows.Connection) {
	n := newConnection(c)
	key := ends{c.Local, c.Remote}
	r.mu.Lock()
	r.open[key] = n
	denied := r.judge(nil, n)
	r.mu.Unlock()
	r.cut(denied)
}

// Closed implements flows.Observer. Connections whose last bytes are still on their way stay in the table, until an audit finds them gone.
func (r *Revoker) Closed(list []flows.End) {
	keys := make([]ends, len(list))
	for i, e := range list {
		keys[i] = ends{e.Local, e.Remote}
	}
	found, err := r.kernel.find(keys)
	if err != nil {
		r.cfg.Logger.Error("revoke: connections that have ended stay in the table until the next audit", "error", err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, key := range keys {
		n := r.open[key] // nil: not told of its beginning; another: its ports are used again
		if found[i] == nil && n != nil && n.Began.Equal(list[i].Began) {
			delete(r.open, key)
		}
	}
}

// Forget drops all connections: Envoy has gone, and with it its sockets.
func (r *Revoker) Forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.open)
}

// Again tries at once to cut what could not be cut.
func (r *Revoker) Again() { r.sweep() }

// sweep holds all open connections against the verdicts in force.
func (r *Revoker) sweep() {
	began := time.Now()
	var denied []sentence
	r.mu.Lock()
	for _, n := range r.open {
		denied = r.judge(denied, n)
	}
	held := len(r.open)
	r.mu.Unlock()
	judged := time.Since(began)
	r.cut(denied)
	r.cfg.Logger.Debug("revoke: swept", "connections", held, "denied", len(denied), "judged", judged, "took", time.Since(began))
}

// sentence is a connection to be cut, and why.
type sentence struct {
	*connection
	reason verdict.Reason
}

// judge adds a connection to the list if the verdicts in force deny it and it is not being cut already. The caller holds the lock.
func (r *Revoker) judge(list []sentence, n *connection) []sentence {
	if n.Always || n.cut {
		return list
	}
	coming := r.cfg.Coming() && time.Since(n.told) < longest
	d := decide(r.cfg.Verdicts.Current(), n)
	switch {
	case d.Allowed:
		return list
	case coming: // Envoy may have let it pass by verdicts that are not in force here yet
		if !n.waits {
			n.waits = true
			time.AfterFunc(moment, func() { r.judgeAgain(n) })
		}
		return list
	}
	n.cut = true
	return append(list, sentence{n, d.Reason})
}

const (
	// moment is how long a young connection waits for verdicts that are about to be applied before it is judged again …
	moment = 2 * time.Millisecond
	// … and longest how old one may be that waits.
	longest = time.Second
)

func (r *Revoker) judgeAgain(n *connection) {
	r.mu.Lock()
	n.waits = false
	denied := r.judge(nil, n)
	r.mu.Unlock()
	r.cut(denied)
}

func decide(v *verdicts.Current, n *connection) verdict.Decision {
	switch {
	case n.odd != "":
		return verdict.Decision{Reason: verdict.Reason{Text: n.odd}}
	case v == nil:
		return verdict.Decision{Reason: verdict.Reason{Text: "no verdicts from the control plane"}}
	case n.Direction == flows.Inbound:
		return v.Ingress.Decide(verdict.TCP, n.Destination.Port(), verdict.Peer{ID: n.id, Addr: n.Source.Addr()})
	}
	return v.Egress.Decide(verdict.TCP, n.Remote.Port(), verdict.Peer{ID: n.id, Addr: n.Remote.Addr()})
}

func newConnection(c flows.Connection) *connection {
	n := &connection{Connection: c, told: time.Now()}
	var err error
	switch {
	case c.Always:
	case c.Direction == flows.Inbound && c.Peer == names.Plaintext, c.Direction == flows.Outbound && c.Peer == "":
	default: // inbound somebody has to be named
		if n.id, err = spiffeid.FromString(c.Peer); err != nil {
			n.odd = "the log does not say who the peer is: " + err.Error()
		}
	}
	if !c.Source.IsValid() || !c.Destination.IsValid() {
		n.odd = "the log does not say from where to where"
	}
	return n
}

// cut resets connections and takes down each that was still open.
func (r *Revoker) cut(list []sentence) {
	for len(list) > 0 {
		n := min(len(list), batch/2)
		r.cutSome(list[:n])
		list = list[n:]
	}
}

// cutSome resets some connections. First the socket towards whoever opened it: he must not take what he has read for all that there was,
// which is how it would look if Envoy found its own connection onward broken and ended the other in good order. That one follows in the same
// message to the kernel.
func (r *Revoker) cutSome(list []sentence) {
	wanted := make([]ends, 0, 2*len(list))
	for _, s := range list {
		wanted = append(wanted, s.captured(), ends{s.Local, s.Remote})
	}
	found, err := r.kernel.find(wanted)
	var doomed []socket
	var of []int // index in list
	for i, k := range found {
		if k != nil {
			doomed, of = append(doomed, *k), append(of, i/2)
		}
	}
	gone := make([]bool, len(list)) // at least one of its sockets was there and is no more
	failed := make([]error, len(list))
	for i, e := range r.kernel.destroy(doomed) {
		switch {
		case e == nil:
			gone[of[i]] = true
		case !errors.Is(e, unix.ENOENT) && !errors.Is(e, unix.ESTALE):
			failed[of[i]] = e
		}
	}
	for i, s := range list {
		if e := errors.Join(err, failed[i]); e != nil {
			r.cfg.Logger.Error("revoke: a connection that policy denies could not be cut; tried again at the next audit", "error", e,
				"source", s.Source, "destination", s.Destination, "peer", s.Peer, "reason", s.reason.Text)
			r.mu.Lock()
			s.cut = false
			r.mu.Unlock()
		}
		if gone[i] {
			r.took(s)
		}
	}
}

// captured is the socket by which Envoy took the connection over: that of the redirect, which leads inbound to the very address and outbound
// to loopback.
func (s sentence) captured() ends {
	if s.Direction == flows.Inbound {
		return ends{netip.AddrPortFrom(s.Destination.Addr(), names.InboundPort), s.Source}
	}
	loopback := netip.IPv6Loopback()
	if s.Source.Addr().Is4() {
		loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	return ends{netip.AddrPortFrom(loopback, names.OutboundPort), s.Source}
}

// took takes down that a connection was cut.
func (r *Revoker) took(s sentence) {
	lived := time.Since(s.Began)
	r.cfg.Logger.Info("revoked", "direction", s.Direction, "source", s.Source, "destination", s.Destination, "peer", s.Peer,
		"policy", s.reason.Policy, "rule", s.reason.Rule, "reason", s.reason.Text, "lived", lived.Round(time.Millisecond))
	peer := s.Peer
	if s.id.IsZero() {
		peer = ""
	}
	r.cfg.Record(flows.Record{
		Time: s.Began, Log: names.LogOpen, Direction: s.Direction, Verdict: flows.Revoked, Peer: peer, Authenticated: s.Authenticated,
		Policy: s.reason.Policy, Rule: s.reason.Rule, Reason: s.reason.Text,
		Source: s.Source, Destination: s.Destination, UpstreamLocal: s.Local, UpstreamRemote: s.Remote, Cluster: s.Cluster,
		DurationSeconds: lived.Seconds(),
	})
}
