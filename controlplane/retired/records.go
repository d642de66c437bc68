// Package retired keeps on record which identities running pods no longer have, for as long as certificates for them can be good, in a Secret
// that all replicas of the control plane share.
//
//	ControlPlane ──Record──► what is known here ──┐
//	                                              ├─ merged, ended ones out, within bounds ──► Secret
//	Secret ──read, watch──► what others know ─────┘
//	                              └── what is new ──► ControlPlane.Recall
//
// # Order
//
// A sidecar is told to refuse a retired identity at once, record or not. The pod itself is given a certificate of its new identity only when the
// record is made (Await): whichever process dies when, either there is a record, or the pod has the old certificate alone and shows it
// to the control plane that comes next.
//
// # What is in the way
//
// Of several who write at once the API server refuses all but one (resourceVersion); the others read what is there then, and write both. What is
// known to a replica is written again where it is missing, so that a Secret that was deleted, or emptied, is whole again as long as one replica
// lives. Nothing that was read is taken away before its end; what cannot be read counts as the worst that it can have said, and is replaced by that: until
// its end could have come, identities count from addresses of pods that have them and from nowhere else (policy.Binding). So do those
// of a namespace whose pods were relabelled more often than can be written down.
//
// It is a Secret, though nothing in it is secret, because whoever empties it while no replica runs has retired identities accepted. Whoever may write
// Secrets in Mantlet's namespace has the authority's key in reach anyway; who may write its ConfigMaps has not.
package retired

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// Config is what Records need. All but Now is required.
//
// Both clients are of one API server.
type Config struct {
	Client kubernetes.Interface // its rate bounds how often the Secret is written, however fast pods are relabelled
	Watch  kubernetes.Interface
	Name   types.NamespacedName // of the Secret
	Worst  time.Duration        // how long an identity that is retired now is refused
	Now    func() time.Time     // nil: time.Now
	Log    *slog.Logger
}

const (
	// lag is how much longer than it counts a record is kept, so that a replica whose clock runs ahead takes nothing from the others.
	lag = 15 * time.Minute
	// ahead is added to an end that is written, so that the Secret is not written for each second by which an end moves.
	ahead = time.Minute
)

// Records are the records of one replica. They are safe for concurrent use.
type Records struct {
	cfg  Config
	lag  time.Duration
	wake chan struct{} // holds a token while there may be something to write

	mu      sync.Mutex
	known   state
	given   uint64            // counts what Record was given
	pending map[string]uint64 // by UID: the last of it that is not on record
	settled chan struct{}     // closed when some of it is
	problem error             // why the last attempt to write failed
	broken  error             // what could not be read, the last time that something could not
}

// New returns Records that know of nothing yet: see Open.
func New(cfg Config) *Records {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return &Records{cfg: cfg, lag: lag, wake: make(chan struct{}, 1), known: newState(), pending: map[string]uint64{}, settled: make(chan struct{})}
}

// Record implements controlplane.Records.
func (r *Records) Record(of policy.Retirement) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.known.covers(of) {
		of.Until = of.Until.Add(ahead)
		r.known.add(of)
	}
	r.given++
	r.pending[of.UID] = r.given
	r.poke()
}

func (r *Records) poke() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Await implements controlplane.Records.
func (r *Records) Await(ctx context.Context, uid string) error {
	for {
		r.mu.Lock()
		_, waits := r.pending[uid]
		settled := r.settled
		r.mu.Unlock()
		if !waits {
			return nil
		}
		select {
		case <-settled:
		case <-ctx.Done():
			r.mu.Lock()
			defer r.mu.Unlock()
			return errors.Join(ctx.Err(), r.problem)
		}
	}
}

// Known is all that is on record, as far as this replica has heard.
func (r *Records) Known() ([]policy.Retirement, []policy.Binding) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.known.retirements(), r.known.bindings()
}

// Problem says why what this replica knows is not on record, or what it could not read there; nil: there is nothing to say.
func (r *Records) Problem() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.known.bound) == 0 {
		r.broken = nil // what was broken has had its effect
	}
	return errors.Join(r.problem, r.broken)
}

// Open reads the Secret, once and now, and mends it if it is broken. There is none before the first pod is relabelled. An error is that it could not be
// read.
func (r *Records) Open(ctx context.Context) error {
	is, err := r.read(ctx)
	if err != nil {
		return err
	}
	_, err = r.reconcile(ctx, is)
	if errors.As(err, new(*unread)) {
		return err
	}
	return nil // what could not be written is tried again by Run
}

// unread is an error of reading.
type unread struct{ error }

// read returns the Secret as it is now; nil: there is none.
func (r *Records) read(ctx context.Context) (*corev1.Secret, error) {
	is, err := r.cfg.Client.CoreV1().Secrets(r.cfg.Name.Namespace).Get(ctx, r.cfg.Name.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil //nolint:nilnil // none is no error
	case err != nil:
		return nil, &unread{fmt.Errorf("secret %s: %w", r.cfg.Name, err)}
	}
	return is, nil
}

// reconcile brings the Secret and what is known here together, beginning with the Secret as it was seen last. It reports whether there was anything new
// for this replica.
func (r *Records) reconcile(ctx context.Context, is *corev1.Secret) (news bool, err error) {
	for {
		next, given, heard, err := r.join(is)
		news = news || heard
		if err != nil {
			return news, r.failed(err)
		}
		err = r.write(ctx, is, next)
		switch {
		case err == nil:
			r.settle(given)
			return news, nil
		case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err), apierrors.IsNotFound(err) && is != nil: // another was first
		default:
			return news, r.failed(fmt.Errorf("secret %s: %w", r.cfg.Name, err))
		}
		if is, err = r.read(ctx); err != nil {
			return news, r.failed(err)
		}
	}
}

// join takes over what a Secret holds, and returns what it should hold, and up to which Record that is.
func (r *Records) join(is *corev1.Secret) (next map[string][]byte, given uint64, news bool, err error) {
	now := r.cfg.Now()
	stored := newState()
	var broken []error
	if is != nil {
		stored, broken = decode(is.Data, now.Add(r.cfg.Worst))
	}
	for _, err := range broken {
		r.cfg.Log.Error("what is on record of retired identities is broken; until the last of it has ended, identities count from addresses of pods that have them only",
			"secret", r.cfg.Name, "error", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := errors.Join(broken...); err != nil {
		r.broken = fmt.Errorf("secret %s was broken and is mended: %w", r.cfg.Name, err)
	}
	joined := r.known.clone()
	joined.merge(stored)
	joined.expire(now.Add(-r.lag))
	if err := joined.fold(); err != nil {
		return nil, 0, false, err
	}
	before, errBefore := r.known.encode()
	next, err = joined.encode()
	r.known = joined
	return next, r.given, !equal(before, next), errors.Join(err, errBefore)
}

func equal(a, b map[string][]byte) bool { return maps.EqualFunc(a, b, bytes.Equal) }

// write writes a Secret where it is not that already.
func (r *Records) write(ctx context.Context, is *corev1.Secret, data map[string][]byte) error {
	api := r.cfg.Client.CoreV1().Secrets(r.cfg.Name.Namespace)
	switch {
	case is == nil && len(data) == 0:
		return nil
	case is == nil:
		_, err := api.Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: r.cfg.Name.Namespace, Name: r.cfg.Name.Name}, Type: corev1.SecretTypeOpaque, Data: data}, metav1.CreateOptions{})
		return err
	case equal(is.Data, data):
		return nil
	}
	next := is.DeepCopy()
	next.Data = data
	_, err := api.Update(ctx, next, metav1.UpdateOptions{}) // refused where somebody has written meanwhile
	return err
}

// settle says that all is on record that Record was given up to one.
func (r *Records) settle(given uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.problem != nil {
		r.cfg.Log.Info("what is retired is on record again", "secret", r.cfg.Name)
	}
	r.problem = nil
	maps.DeleteFunc(r.pending, func(_ string, n uint64) bool { return n <= given })
	close(r.settled)
	r.settled = make(chan struct{})
}

func (r *Records) failed(err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.problem = fmt.Errorf("retired identities cannot be put on record: %w", err)
	return err
}
