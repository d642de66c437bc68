package authority

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/identity/ca"
)

// While a rotation is under way the Secret holds beside what is in force what comes next, so that whoever goes on with it needs nothing else.
const (
	nextKey   = "next.key"
	nextChain = "next.crt"
	nextRoots = "next.ca.crt"
	// steppedAt is the annotation that says when the last step was written, RFC 3339.
	steppedAt = "mantlet.dev/rotation-step"
	// managedBy is the annotation by which cert-manager claims a Secret.
	managedBy = "cert-manager.io/certificate-name"
)

// Step is how far a rotation is.
type Step string

// The steps, as ca.Rotation has them.
const (
	Settled   Step = "settled" // nothing is under way
	Prepared  Step = "prepared"
	Activated Step = "activated"
)

// Text says what is in force at a step.
func (s Step) Text() string {
	switch s {
	case Settled:
		return "no rotation is under way"
	case Prepared:
		return "step 1 of 3, the old root signs and both are trusted"
	case Activated:
		return "step 2 of 3, the new root signs and both are trusted"
	}
	return string(s)
}

// ErrMoved is wrapped by errors of writing a step where somebody else has written the Secret since it was read: read it again.
var ErrMoved = errors.New("somebody else has written it")

// State is a Secret with the authority as it was read.
type State struct {
	Step      Step
	Since     time.Time // when the step was written; zero: it was never rotated
	Authority *ca.CA    // that is to be in force
	secret    *corev1.Secret
	next      ca.Material
}

// State reads how far a rotation is. It takes the trust domain from cfg.
func (s Secret) State(ctx context.Context, cfg ca.Config) (State, error) {
	is, err := s.Client.CoreV1().Secrets(s.Name.Namespace).Get(ctx, s.Name.Name, metav1.GetOptions{})
	if err != nil {
		return State{}, fmt.Errorf("secret %s: %w", s.Name, err)
	}
	st := State{secret: is, next: ca.Material{Key: is.Data[nextKey], Chain: is.Data[nextChain], Roots: is.Data[nextRoots]}}
	if st.Authority, err = ca.Load(cfg, material(is)); err != nil {
		return State{}, fmt.Errorf("%w: secret %s: %w", ErrUnusable, s.Name, err)
	}
	if at, ok := is.Annotations[steppedAt]; ok {
		if st.Since, err = time.Parse(time.RFC3339, at); err != nil {
			return State{}, fmt.Errorf("%w: secret %s: annotation %s: %w", ErrUnusable, s.Name, steppedAt, err)
		}
	}
	switch {
	case len(st.next.Key)+len(st.next.Chain)+len(st.next.Roots) == 0:
		st.Step = Settled
		return st, nil
	case bytes.Equal(is.Data[corev1.TLSPrivateKeyKey], st.next.Key):
		st.Step = Activated
	default:
		st.Step = Prepared
	}
	if _, err := ca.Load(cfg, st.next); err != nil {
		return State{}, fmt.Errorf("%w: secret %s: what comes next in the rotation: %w\n  hint: take %s, %s and %s out, and rotate anew", ErrUnusable, s.Name, err, nextKey, nextChain, nextRoots)
	}
	return st, nil
}

// Advance writes the step after a State: of none the first, with a new root of cfg. It returns the State then. An error that wraps [ErrMoved] says that somebody else
// has written the Secret meanwhile, whose State has to be looked at first. Whether all replicas and sidecars have the step before is for the caller to know.
func (s Secret) Advance(ctx context.Context, from State, cfg ca.Config, now time.Time) (State, error) {
	to := from.secret.DeepCopy()
	to.Data = maps.Clone(to.Data)
	var m ca.Material
	switch from.Step {
	case Settled:
		if name, ok := to.Annotations[managedBy]; ok {
			return State{}, fmt.Errorf("secret %s: cert-manager keeps it (certificate %s)\n  hint: it is rotated there", s.Name, name)
		}
		made, err := ca.New(cfg)
		if err != nil {
			return State{}, err
		}
		next, err := made.Material()
		if err != nil {
			return State{}, err
		}
		m = ca.Rotation{Old: material(to), New: next}.Prepared()
		to.Data[nextKey], to.Data[nextChain], to.Data[nextRoots] = next.Key, next.Chain, next.Roots
	case Prepared:
		// The roots stay those that are trusted already, whatever else was added to them.
		m = ca.Material{Key: from.next.Key, Chain: from.next.Chain, Roots: to.Data[rootsKey]}
	case Activated:
		m = from.next
		delete(to.Data, nextKey)
		delete(to.Data, nextChain)
		delete(to.Data, nextRoots)
	default:
		return State{}, fmt.Errorf("secret %s: step %q is none", s.Name, from.Step)
	}
	if err := from.Authority.Replace(m); err != nil { // as replicas will judge; From is of no use any more
		return State{}, fmt.Errorf("secret %s: the step after %q: %w", s.Name, from.Step, err)
	}
	to.Data[corev1.TLSPrivateKeyKey], to.Data[corev1.TLSCertKey], to.Data[rootsKey] = m.Key, m.Chain, m.Roots
	if to.Annotations == nil {
		to.Annotations = map[string]string{}
	}
	to.Annotations[steppedAt] = now.UTC().Format(time.RFC3339)
	_, err := s.Client.CoreV1().Secrets(s.Name.Namespace).Update(ctx, to, metav1.UpdateOptions{})
	switch {
	case apierrors.IsConflict(err):
		return State{}, fmt.Errorf("secret %s: %w: %w", s.Name, ErrMoved, err)
	case err != nil:
		return State{}, fmt.Errorf("secret %s: %w", s.Name, err)
	}
	return s.State(ctx, cfg)
}
