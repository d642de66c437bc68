package controlplane

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
)

// settle is from a certificate's signature until the pod's Envoy uses it, and the bundle that came with it: a few milliseconds, on a busy
// machine some hundred.
const settle = 2 * time.Second

// given is what a pod was given last.
type given struct {
	uid   string
	until time.Time // the certificate is valid
	by    string    // the authority that gave it, with these roots (ca.CA.Fingerprint); empty: one that was another the next moment
	at    time.Time // since when it has had that
	last  time.Time // when it was given anything
}

// note keeps what a pod was given.
func (cp *ControlPlane) note(pod attest.Pod, leaf *x509.Certificate, bundle *x509bundle.Bundle) {
	by := cp.authority.Fingerprint()
	if !bundle.Equal(cp.authority.Bundle()) || !cp.authority.Signed(leaf) || cp.authority.Fingerprint() != by {
		by = "" // a step of a rotation came between
	}
	cp.mu.Lock()
	defer cp.mu.Unlock()
	now := cp.now()
	next := given{uid: pod.UID, until: leaf.NotAfter, by: by, at: now, last: now}
	if old, ok := cp.given[pod.String()]; ok && old.uid == pod.UID && old.by == by {
		next.at = old.at
	}
	cp.given[pod.String()] = next
	close(cp.givenChanged)
	cp.givenChanged = make(chan struct{})
}

// settled reports whether a pod has what an authority gives, and has had it long enough to use it.
func (g given) settled(authority string, now time.Time) bool {
	return g.by == authority && now.Sub(g.at) >= settle
}

// Behind lists the pods with a sidecar ("namespace/name", sorted) that may not use yet what the authority gives now: neither a certificate
// that its present key signed, nor its present roots. Those that another replica has served, or an earlier process, are among them until
// they come here.
func (cp *ControlPlane) Behind() []string {
	list, _, _ := cp.behind()
	return list
}

func (cp *ControlPlane) behind() (list []string, next time.Duration, changed <-chan struct{}) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	next = time.Hour
	for name := range cp.given {
		if _, ok := cp.index.Pod(name); !ok {
			delete(cp.given, name)
		}
	}
	by := cp.authority.Fingerprint()
	for _, key := range cp.index.SubjectKeys() {
		for _, name := range cp.index.SubjectByKey(key).Pods() {
			p, _ := cp.index.Pod(name)
			g, known := cp.given[name]
			switch {
			case !p.Sidecar:
			case !known || g.uid != p.UID || g.by != by:
				list = append(list, name)
			case !g.settled(by, cp.now()):
				list = append(list, name)
				next = min(next, settle-cp.now().Sub(g.at))
			}
		}
	}
	slices.Sort(list)
	return list, next, cp.givenChanged
}

// Rotate goes through a rotation of the root. Each step waits until no pod is behind with the one before it: at most the time in which all agents
// renew. announce is told of the bundle of each step before the pods are: whoever starts from then on has to be given that one.
//
// When the context ends first the step that was reached stays in force, which is no harm, and the error says who was behind. What a pod
// misses that cannot be reached all that time it learns of no more: its agent has to start anew, with the new bundle.
func (cp *ControlPlane) Rotate(ctx context.Context, next ca.Material, announce func(*x509bundle.Bundle) error) error {
	if cp.authority == nil {
		return errors.New("rotate the root: this control plane signs nothing")
	}
	old, err := cp.authority.Material()
	if err != nil {
		return err
	}
	r := ca.Rotation{Old: old, New: next}
	for _, step := range []struct {
		name string
		m    ca.Material
	}{{"prepare", r.Prepared()}, {"activate", r.Activated()}, {"retire", r.New}} {
		if err := cp.authority.Replace(step.m); err != nil {
			return fmt.Errorf("rotate the root: %s: %w", step.name, err)
		}
		cp.log.Info("rotation of the root", "step", step.name)
		if err := announce(cp.authority.Bundle()); err != nil {
			return fmt.Errorf("rotate the root: %s: announce the bundle: %w", step.name, err)
		}
		if err := cp.awaitAll(ctx); err != nil {
			return fmt.Errorf("rotate the root: %s: %w", step.name, err)
		}
	}
	return nil
}

// awaitAll waits until no pod is behind.
func (cp *ControlPlane) awaitAll(ctx context.Context) error {
	for {
		list, next, changed := cp.behind()
		if len(list) == 0 {
			return nil
		}
		due := time.NewTimer(next)
		select {
		case <-ctx.Done():
			due.Stop()
			return fmt.Errorf("%w; without new certificates are %s", ctx.Err(), strings.Join(list, ", "))
		case <-changed:
		case <-due.C:
		}
		due.Stop()
	}
}
