// Package rotation takes a cluster from one root to another, by the Secret that all replicas follow.
//
//	Secret ──State──► step ─┐
//	                        ├─ is the step with every replica, namespace and sidecar? ──► Secret: the next step
//	replicas ──Status──► what each has in force, what each sidecar was given last ─┘
//
// Nothing is kept here: whoever is killed at any point, or runs beside another, goes on from what the Secret says. Each step is written only where nobody
// has written since it was read (resourceVersion). What the steps are, and why none may be left out, says ca.Rotation.
package rotation

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/controlplane/authority"
	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/identity/ca"
)

// Pause is the least time from one step to the next: by then webhook configurations have the roots (a minute at most), and kubelets have brought them to
// the volumes of pods that are about to start.
const Pause = 2 * time.Minute

// Replicas tells what all of them report; *ask.Source does.
type Replicas interface {
	Status(context.Context) (status.Status, error)
}

// Rotation is one, under way or not. All fields but Now are required.
type Rotation struct {
	Secret   authority.Secret
	Replicas Replicas
	Pause    time.Duration
	Now      func() time.Time // nil: time.Now
}

// Position is how far a rotation is.
type Position struct {
	Step   authority.Step `json:"step"`
	Since  time.Time      `json:"since,omitzero"`  // when that was written
	Waits  string         `json:"waits,omitempty"` // for what, beside Behind; empty: for nothing
	Behind []string       `json:"behind"`          // sidecars that may not have what the step gives, "namespace/name"; known where there are no Waits

	state authority.State
	cfg   ca.Config
}

// Complete reports whether nothing is under way, and everybody has the roots.
func (p Position) Complete() bool {
	return p.Step == authority.Settled && p.Waits == "" && len(p.Behind) == 0
}

// Text says where it stands in one line.
func (p Position) Text() string { return fmt.Sprintf("%s: %s", p.Step.Text(), p.Missing()) }

// Missing says in one line what the step waits for.
func (p Position) Missing() string {
	switch {
	case p.Waits != "":
		return p.Waits
	case len(p.Behind) == 1:
		return fmt.Sprintf("1 sidecar may not have that yet (%s)", p.Behind[0])
	case len(p.Behind) > 3:
		return fmt.Sprintf("%d sidecars may not have that yet (%s, …)", len(p.Behind), strings.Join(p.Behind[:3], ", "))
	case len(p.Behind) > 0:
		return fmt.Sprintf("%d sidecars may not have that yet (%s)", len(p.Behind), strings.Join(p.Behind, ", "))
	}
	return "all sidecars have that"
}

// Look finds out how far it is.
func (r Rotation) Look(ctx context.Context) (Position, error) {
	s, err := r.Replicas.Status(ctx)
	if err != nil {
		return Position{}, err
	}
	td, err := trustDomain(s)
	if err != nil {
		return Position{}, err
	}
	p := Position{cfg: ca.Config{TrustDomain: td}}
	if p.state, err = r.Secret.State(ctx, p.cfg); err != nil {
		return Position{}, err
	}
	p.Step, p.Since = p.state.Step, p.state.Since
	p.Behind, p.Waits = s.Adopted(p.state.Authority.Fingerprint()) // what they had before it was read: at worst the step before
	return p, nil
}

func trustDomain(s status.Status) (spiffeid.TrustDomain, error) {
	var why []string
	for _, r := range s.Replicas {
		if r.TrustDomain != "" {
			return spiffeid.TrustDomainFromString(r.TrustDomain)
		}
		why = append(why, fmt.Sprintf("%s: %s", r.Name, r.Error))
	}
	return spiffeid.TrustDomain{}, fmt.Errorf("no replica answers: %s", strings.Join(why, "; "))
}

// ErrWaits is wrapped by Advance's error where the next step may not be taken yet.
var ErrWaits = errors.New("not yet")

// Advance writes the step that follows a Position, or begins a rotation where none is under way.
func (r Rotation) Advance(ctx context.Context, p Position) error {
	now := r.Now
	if now == nil {
		now = time.Now
	}
	switch left := r.Pause - now().Sub(p.Since); {
	case p.Waits != "", p.Step != authority.Settled && len(p.Behind) > 0:
		return fmt.Errorf("%w: %s", ErrWaits, p.Text())
	case p.Step != authority.Settled && left > 0:
		return fmt.Errorf("%w: %s: the next step is taken %s after this one was", ErrWaits, p.Step.Text(), r.Pause)
	}
	_, err := r.Secret.Advance(ctx, p.state, p.cfg, now())
	if errors.Is(err, authority.ErrMoved) {
		return fmt.Errorf("%w: %w", ErrWaits, err)
	}
	return err
}
