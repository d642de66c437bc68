package hold

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	nflog "github.com/florianl/go-nflog/v2"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/mantlet/mantlet/verdict"
)

// Holder is the SYN hold of one network namespace: that of the thread which called Open. Its methods may be called from anywhere.
type Holder struct {
	asker  Asker
	logger *slog.Logger
	sender *sender
	shape  *shape
	log    *nflog.Nflog
	// register binds the NFLOG group; tests come in between.
	register func(ctx context.Context, fn nflog.HookFunc, errfn nflog.ErrorFunc) error

	crowded rate.Sometimes // says that there are too many questions

	running atomic.Bool // Run hears of unknown destinations

	failed chan error // the first failure, for Run
	asking sync.WaitGroup

	queue sync.Mutex
	batch *batch // changes that wait for the transaction in flight

	mu      sync.Mutex // all below
	cfg     Config
	kernel  *kernel
	ledger  *ledger
	pending map[netip.AddrPort]*question
	held    int // SYNs in pending
	holding bool
	ctx     context.Context // of the questions; nil unless Run runs
}

// question is an outstanding one.
type question struct {
	syns      []syn
	overruled bool // Set, Flip or Forget said something meanwhile, which is newer
}

// Open writes the table, in place of any that is there, and thereby holds every unknown destination. Nothing is asked before Run runs.
func Open(cfg Config, asker Asker, logger *slog.Logger) (*Holder, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	k, err := newKernel(cfg)
	if err != nil {
		return nil, err
	}
	shape, err := newShape(cfg, k.sets, logger)
	if err != nil {
		k.close()
		return nil, err
	}
	s, err := newSender()
	if err != nil {
		k.close()
		shape.close()
		return nil, err
	}
	l, err := nflog.Open(&nflog.Config{Group: cfg.Group, Copymode: nflog.CopyPacket})
	if err == nil {
		err = l.Con.SetReadBuffer(1 << 20) // a burst of SYNs
	}
	h := &Holder{
		asker: asker, logger: logger, sender: s, shape: shape, log: l, cfg: cfg, kernel: k, holding: true, failed: make(chan error, 1), crowded: rate.Sometimes{Interval: time.Second},
		ledger: newLedger(cfg.MaxAllowed, cfg.MaxDenied), pending: map[netip.AddrPort]*question{},
	}
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("hold: open NFLOG: %w", err)
	}
	h.register = func(ctx context.Context, fn nflog.HookFunc, errfn nflog.ErrorFunc) error {
		if cfg.Binding != nil {
			if err := cfg.Binding(); err != nil {
				return err
			}
		}
		return bind(ctx, l, fn, errfn)
	}
	err = shape.write(true)
	if errors.Is(err, unix.ENOENT) { // no logger to be had
		h.holding = false
		h.warnNoNFLOG(err)
		err = shape.write(false)
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// Close ends what Open began and Run does not use any more. The table stays, and so does what it holds.
func (h *Holder) Close() {
	if h.log != nil {
		_ = h.log.Close()
	}
	h.sender.close()
	h.shape.close()
	h.kernel.close()
}

// Run answers for unknown destinations until ctx ends (nil) or the kernel refuses something (the error; everything unknown then stays
// held, and a new Holder is needed). It may run once.
func (h *Holder) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer h.asking.Wait()
	defer cancel()
	h.mu.Lock()
	h.ctx = ctx
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		h.ctx = nil // no question begins any more
		h.mu.Unlock()
	}()
	if err := h.listen(ctx); err != nil {
		return err
	}
	h.running.Store(true)
	defer h.running.Store(false)
	h.mu.Lock()
	sweep := time.NewTicker(h.cfg.Idle / 4)
	h.mu.Unlock()
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-h.failed:
			return err
		case <-sweep.C:
			if err := h.sweep(); err != nil {
				return err
			}
		}
	}
}

// listen binds the NFLOG group, or lets SYNs to unknown destinations go on where the kernel has no NFLOG.
func (h *Holder) listen(ctx context.Context) error {
	if !h.Holding() {
		return nil
	}
	err := h.register(ctx, func(a nflog.Attribute) int {
		switch {
		case a.Payload == nil:
		case a.Prefix != nil && strings.HasPrefix(*a.Prefix, refusedPrefix):
			h.refused(*a.Payload, a.Hook != nil && *a.Hook == unix.NF_INET_PRE_ROUTING)
		default:
			h.receive(*a.Payload)
		}
		return 0
	}, func(err error) int {
		switch {
		case ctx.Err() != nil:
			return 1
		case errors.Is(err, unix.ENOBUFS): // more SYNs than were read; TCP sends those again
			h.logger.Warn("hold: too many new connections at once; some take a second longer")
			return 0
		}
		h.fail(fmt.Errorf("hold: read NFLOG: %w", err))
		return 1
	})
	switch {
	case err == nil:
		return nil
	case !missing(err):
		return fmt.Errorf("hold: bind NFLOG group %d: %w", h.cfg.Group, err)
	}
	h.warnNoNFLOG(err)
	return h.anew(false)
}

func (h *Holder) warnNoNFLOG(cause error) {
	h.logger.Warn("hold: the kernel has no NFLOG (nfnetlink_log): connections to denied destinations inside the cluster are accepted here and then closed", "cause", cause)
}

// anew writes the table once more. Nothing is known of any destination then.
func (h *Holder) anew(holding bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.holding = holding
	h.ledger = newLedger(h.cfg.MaxAllowed, h.cfg.MaxDenied)
	return h.shape.write(holding)
}

// Name is the table's. With Wrote, Check and Repair it lets netfilter.Guard look after it: its rules, chains and sets, in the calling thread's network namespace. What
// the sets hold it leaves alone. Whoever takes an element away has the destination asked about again, or, outside the cluster, refused until
// the policy changes; whoever adds one lets SYNs go on to Envoy, who decides anyway.
func (h *Holder) Name() string { return TableName }

// Wrote reports whether a transaction on rules, chains or sets was the Holder's, by the netlink port that it came from.
func (h *Holder) Wrote(port uint32) bool { return port != 0 && port == h.shape.port.Load() }

// Check fails where the table is not as it was written.
func (h *Holder) Check() error {
	if err := h.shape.check(); err != nil {
		return fmt.Errorf("hold: %w", err)
	}
	return nil
}

// Repair writes the table again; every destination is asked about again.
func (h *Holder) Repair() error { return h.anew(h.Holding()) }

// missing reports whether an error of binding says that the kernel has no nfnetlink_log: EINVAL for its whole subsystem. The library
// hands on the text only.
func missing(err error) bool { return strings.Contains(err.Error(), unix.EINVAL.Error()) }

// Running reports whether Run is at it. Before and after, SYNs to unknown destinations wait.
func (h *Holder) Running() bool { return h.running.Load() }

// Holding reports whether SYNs to unknown destinations are held (true), or go on because the kernel has no NFLOG.
func (h *Holder) Holding() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.holding
}

// Sizes are the numbers of what a Holder keeps.
type Sizes struct{ Allowed, Denied, Questions, Held int }

// Sizes tells how much the Holder keeps now.
func (h *Holder) Sizes() Sizes {
	h.mu.Lock()
	defer h.mu.Unlock()
	return Sizes{Allowed: h.ledger.recent[1].Len(), Denied: h.ledger.recent[0].Len(), Questions: len(h.pending), Held: h.held}
}

// fail ends Run.
func (h *Holder) fail(err error) {
	select {
	case h.failed <- err:
	default:
	}
}

// refused tells of a refused connection.
func (h *Holder) refused(logged []byte, inbound bool) {
	p, err := parse(logged)
	if err == nil && h.cfg.Refused != nil {
		h.cfg.Refused(Refusal{Source: p.source, Destination: p.dest, Inbound: inbound})
	}
}

// receive takes a logged packet. What it does not take stays dropped.
func (h *Holder) receive(logged []byte) {
	p, err := parse(logged)
	if err != nil {
		h.logger.Debug("hold: logged packet ignored", "cause", err)
		return
	}
	h.mu.Lock()
	if h.ctx == nil {
		h.mu.Unlock()
		return
	}
	h.asking.Add(1) // Run waits for what begins before its end
	defer h.asking.Done()
	q, asked := h.pending[p.dest]
	switch {
	case asked:
		h.keep(q, p)
	case h.ledger.justWritten(p.dest, time.Now()): // while the packet was on its way here
		h.mu.Unlock()
		h.send(p)
		return
	case len(h.pending) >= h.cfg.MaxQuestions:
		c := h.cfg
		h.mu.Unlock()
		h.crowded.Do(func() { // a scan would bury what else is logged
			h.logger.Warn("hold: too many questions at a time; refused, as others are that this is not said of", "destination", p.dest, "questions", c.MaxQuestions)
		})
		if h.commit(change{dest: p.dest, ttl: c.ErrorTTL}) == nil {
			h.send(p)
		}
		return
	default:
		q := &question{}
		h.keep(q, p)
		h.pending[p.dest] = q
		ctx := h.ctx
		h.asking.Go(func() { h.ask(ctx, p.dest, q) })
	}
	h.mu.Unlock()
}

// keep keeps a SYN until its question is answered. TCP sends again what is not kept.
func (h *Holder) keep(q *question, p syn) {
	if h.held < h.cfg.MaxHeld {
		q.syns = append(q.syns, p)
		h.held++
	}
}

// ask gets the answer, writes it, and lets the SYNs meet it.
func (h *Holder) ask(ctx context.Context, dest netip.AddrPort, q *question) {
	h.mu.Lock()
	patience, idle, errorTTL := h.cfg.Patience, h.cfg.Idle, h.cfg.ErrorTTL
	h.mu.Unlock()
	asked, cancel := context.WithTimeout(ctx, patience)
	allowed, err := h.asker.Ask(asked, dest)
	if err == nil {
		err = asked.Err() // an answer after the end is none
	}
	cancel()
	c := change{dest: dest, allowed: allowed, ttl: ttl(allowed, idle), answers: q}
	if err != nil {
		h.logger.Warn("hold: no answer; refused", "destination", dest, "for", errorTTL, "cause", err)
		c.allowed, c.ttl = false, errorTTL
	}
	err = h.commit(c)
	h.mu.Lock()
	delete(h.pending, dest)
	h.held -= len(q.syns)
	h.mu.Unlock()
	if err != nil {
		return // not written: they stay dropped
	}
	for _, p := range q.syns {
		h.send(p)
	}
}

func (h *Holder) send(p syn) {
	if err := h.sender.send(p); err != nil {
		h.logger.Warn("hold: TCP will send it again", "cause", err)
	}
}

// ttl is the life of an element in the kernel. Sweeps renew allowed ones that are used.
func ttl(allowed bool, idle time.Duration) time.Duration {
	if allowed {
		return 2 * idle
	}
	return idle
}

// Set writes the verdict on a destination inside the cluster. When it returns nil the kernel has it. It overrules the answer to a
// question about the destination that is outstanding at the time.
func (h *Holder) Set(dest netip.AddrPort, allowed bool) error {
	return h.Flip(map[netip.AddrPort]bool{dest: allowed})
}

// Flip is Set for many destinations, and Forget for those that are unknown from now on, in one transaction: there is no moment between two
// of them.
func (h *Holder) Flip(verdicts map[netip.AddrPort]bool, unknown ...netip.AddrPort) error {
	h.mu.Lock()
	idle := h.cfg.Idle
	h.mu.Unlock()
	changes := make([]change, 0, len(verdicts)+len(unknown))
	for dest, allowed := range verdicts {
		changes = append(changes, change{dest: plain(dest), allowed: allowed, ttl: ttl(allowed, idle)})
	}
	for _, dest := range unknown {
		changes = append(changes, change{dest: plain(dest)})
	}
	return h.commit(changes...)
}

// Forget takes back what is known of destinations: the next SYN is held and asked about, and so is one whose answer is outstanding at the
// time. Config.Forgotten is not told.
func (h *Holder) Forget(dests ...netip.AddrPort) error { return h.Flip(nil, dests...) }

func plain(d netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(d.Addr().Unmap().WithZone(""), d.Port())
}

// SetServices says which external addresses of Services there are now, with their ports: destinations there are asked about, whosever the addresses
// are. When it returns nil the kernel has them.
func (h *Holder) SetServices(services []netip.AddrPort) error {
	err := h.shape.serve(services)
	if err != nil {
		h.fail(err)
	}
	return err
}

// SetExternal puts the verdicts of an egress table on destinations outside the cluster in force.
func (h *Holder) SetExternal(egress verdict.Table) error { return h.outside(0, &egress) }

// SetInbound puts the verdicts of an ingress table on sources outside the cluster in force.
func (h *Holder) SetInbound(ingress verdict.Table) error { return h.outside(1, &ingress) }

func (h *Holder) outside(i int, t *verdict.Table) error {
	err := h.shape.replace(i, t)
	if err != nil {
		h.fail(err)
	}
	return err
}
