package svid

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const (
	attemptTimeout = 10 * time.Second
	firstRetry     = 100 * time.Millisecond
	lastRetry      = 30 * time.Second
	// shortest is the least time between two renewals, whatever the validity of the certificates.
	shortest = time.Second
)

// BuiltinConfig is what a Builtin needs. Everything but Reread, DialContext, MaxAge and Now is required.
type BuiltinConfig struct {
	Address     string               // the control plane's gRPC server, "host:port"
	TrustDomain spiffeid.TrustDomain // of the workload and of the control plane
	Bundle      *x509bundle.Bundle   // roots that the control plane is verified against the first time; later ones come with each SVID
	// Reread is where Bundle came from, as it is now. It is asked when an attempt has failed: a control plane that cannot be verified
	// may have gone through a rotation of its root in which it was not reached. Nil: Bundle never changes.
	Reread func() (*x509bundle.Bundle, error)
	Token  func() (string, error) // this pod's token; asked for each attempt
	Log    *slog.Logger
	// DialContext opens the connection to Address; nil: a net.Dialer over TCP.
	DialContext func(ctx context.Context, addr string) (net.Conn, error)
	// MaxAge renews earlier than at half-life where that would be later; zero: never earlier.
	MaxAge time.Duration
	// Now is the wall clock; nil: time.Now.
	Now func() time.Time
}

// Builtin is the Source whose SVIDs Mantlet's own CA signs. It works while Run runs.
type Builtin struct {
	cfg     BuiltinConfig
	running atomic.Bool
	ready   chan struct{}
	renew   chan struct{} // holds one request for an early renewal

	mu      sync.Mutex
	svid    *x509svid.SVID // nil: none, or expired
	bundle  *x509bundle.Bundle
	written *x509bundle.Bundle // by Reread, when it was looked at last
	newer   *x509bundle.Bundle // by Reread, newer than bundle; nil: it is not
	updated chan struct{}
}

// NewBuiltin checks the configuration; the work is done by Run.
func NewBuiltin(cfg BuiltinConfig) (*Builtin, error) {
	fail := func(what string) (*Builtin, error) {
		return nil, fmt.Errorf("built-in identity source: no %s; set it in the configuration", what)
	}
	switch {
	case cfg.Address == "":
		return fail("control plane address")
	case cfg.TrustDomain.IsZero():
		return fail("trust domain")
	case cfg.Bundle == nil || cfg.Bundle.Empty():
		return fail("root in the trust bundle")
	case cfg.Bundle.TrustDomain() != cfg.TrustDomain:
		return nil, fmt.Errorf("built-in identity source: the trust bundle is of %q, not of %q", cfg.Bundle.TrustDomain(), cfg.TrustDomain)
	case cfg.Token == nil:
		return fail("token source")
	case cfg.Log == nil:
		return fail("logger")
	}
	if cfg.DialContext == nil {
		cfg.DialContext = func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Builtin{
		cfg:     cfg,
		ready:   make(chan struct{}),
		renew:   make(chan struct{}, 1),
		bundle:  cfg.Bundle.Clone(),
		written: cfg.Bundle.Clone(),
		updated: make(chan struct{}),
	}, nil
}

// Run gets the first SVID as soon as it can and renews it until the context ends; then it returns nil. Attempts that fail are
// logged and repeated, with waits that double from 0.1 s to 30 s, half of each random, so that the pods of a cluster do not
// return in step after an outage. When the wall clock is set, or the machine has slept, it renews within seconds: what was computed with the
// clock of before means nothing any more.
func (b *Builtin) Run(ctx context.Context) error {
	if b.running.Swap(true) {
		return errors.New("built-in identity source: Run is called twice")
	}
	var expiry <-chan time.Time // nil while there is no SVID
	retry := firstRetry
	wall := newClock(b.cfg.Now)
	look := time.NewTicker(clockCheck)
	defer look.Stop()
	for {
		var wait time.Duration
		if next, err := b.attempt(ctx); err == nil {
			b.replace(next)
			left := next.svid.Certificates[0].NotAfter.Sub(b.cfg.Now().Round(0))
			expiry = time.After(left)
			wait, retry = b.renewIn(left), firstRetry
			b.cfg.Log.Info("identity renewed", "id", next.svid.ID.String(),
				"serial", next.svid.Certificates[0].SerialNumber.Text(16), "until", next.svid.Certificates[0].NotAfter, "renewal_in", wait)
		} else if ctx.Err() == nil {
			wait = retry/2 + rand.N(retry/2)
			retry = min(2*retry, lastRetry)
			b.reread()
			b.cfg.Log.Warn("identity not renewed", "control_plane", b.cfg.Address, "error", err, "retry_in", wait)
		}
		due := time.After(wait)
	waiting:
		for {
			select {
			case <-ctx.Done():
				return nil
			case <-expiry:
				expiry = nil
				b.expire()
			case <-b.renew:
				break waiting
			case <-look.C:
				if moved := wall.set(); moved != 0 {
					b.cfg.Log.Warn("the clock was set, or the machine slept: renewing the identity", "moved", moved)
					break waiting
				}
			case <-due:
				break waiting
			}
		}
	}
}

// renewIn is half of the validity that is left, or MaxAge if that is less, ±10 %.
func (b *Builtin) renewIn(left time.Duration) time.Duration {
	wait := left / 2
	if b.cfg.MaxAge > 0 {
		wait = min(wait, b.cfg.MaxAge)
	}
	return max(time.Duration(float64(wait)*(0.9+0.2*rand.Float64())), shortest)
}

// Ready returns a channel that is closed once the first SVID is there.
func (b *Builtin) Ready() <-chan struct{} { return b.ready }

// Renew asks for a renewal now, for example because the control plane says that the pod has another identity. It does not wait.
func (b *Builtin) Renew() {
	select {
	case b.renew <- struct{}{}:
	default: // one is asked for already
	}
}

// Updated implements Source.
func (b *Builtin) Updated() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.updated
}

// GetX509SVID implements x509svid.Source.
func (b *Builtin) GetX509SVID() (*x509svid.SVID, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.svid == nil {
		return nil, errors.New("no valid X.509-SVID: the control plane has not signed one yet, or the last one has expired")
	}
	// The wall clock is asked each time: the timer for expiry does not run while the machine sleeps.
	if end := b.svid.Certificates[0].NotAfter; !b.cfg.Now().Before(end) {
		return nil, fmt.Errorf("X.509-SVID of %s expired at %s and is not renewed", b.svid.ID, end.UTC().Format(time.RFC3339))
	}
	return b.svid, nil
}

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (b *Builtin) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.bundle.GetX509BundleForTrustDomain(td)
}

func (b *Builtin) replace(next signed) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.svid, b.bundle, b.newer = next.svid, next.bundle, nil
	b.announce()
	select {
	case <-b.ready:
	default:
		close(b.ready)
	}
}

// reread looks whether the roots that this began with have been written anew. Then the control plane may be verified by them too, until it
// has said itself what its roots are. Nobody else is.
func (b *Builtin) reread() {
	if b.cfg.Reread == nil {
		return
	}
	now, err := b.cfg.Reread()
	if err != nil {
		b.cfg.Log.Warn("the trust bundle cannot be read again", "error", err)
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if now.TrustDomain() != b.cfg.TrustDomain || now.Empty() || now.Equal(b.written) {
		return
	}
	b.written, b.newer = now.Clone(), now.Clone()
	b.cfg.Log.Info("the trust bundle was written anew; the control plane is verified by it too")
}

// forControlPlane is what the control plane is verified by.
func (b *Builtin) forControlPlane() *x509bundle.Bundle {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := b.bundle.Clone()
	if b.newer != nil {
		for _, root := range b.newer.X509Authorities() {
			out.AddX509Authority(root)
		}
	}
	return out
}

func (b *Builtin) expire() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.cfg.Log.Error("identity expired before it could be renewed; peers refuse this pod until it is", "id", b.svid.ID.String())
	b.svid = nil
	b.announce()
}

func (b *Builtin) announce() {
	close(b.updated)
	b.updated = make(chan struct{})
}
