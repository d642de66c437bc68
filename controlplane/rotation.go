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
	uid    string
	leaf   []byte    // DER; parsed it would be six times as large
	until  time.Time // it is valid
	bundle *x509bundle.Bundle
	at     time.Time // since when it has had that from this authority, with these roots
	last   time.Time // when it was given anything
}

// note keeps what a pod was given.
func (cp *ControlPlane) note(pod attest.Pod, leaf *x509.Certificate, bundle *x509bundle.Bundle) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	if cp.bundle != nil && cp.bundle.Equal(bundle) {
		bundle = cp.bundle // one for all
	}
	cp.bundle = bundle
	next := given{uid: pod.UID, leaf: leaf.Raw, until: leaf.NotAfter, bundle: bundle, at: cp.now(), last: cp.now()}
	if old, ok := cp.given[pod.String()]; ok && old.uid == pod.UID && cp.current(old) && cp.current(next) {
		next.at = old.at
	}
	cp.given[pod.String()] = next
	close(cp.givenChanged)
	cp.givenChanged = make(chan struct{})
}

// current reports whether a pod has what the authority gives now.
func (cp *ControlPlane) current(g given) bool {
	if !g.bundle.Equal(cp.authority.Bundle()) {
		return false
	}
	leaf, err := x509.ParseCertificate(g.leaf)
	return err == nil && cp.authority.Signed(leaf)
}

// settled reports whether a pod has what the authority gives now, and has had it long enough to use it.
func (cp *ControlPlane) settled(g given) bool { return cp.current(g) && cp.now().Sub(g.at) >= settle }

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
	for _, key := range cp.index.SubjectKeys() {
		for _, name := range cp.index.SubjectByKey(key).Pods() {
			p, _ := cp.index.Pod(name)
			g, known := cp.given[name]
			switch {
			case !p.Sidecar:
			case !known || g.uid != p.UID || !cp.current(g):
				list = append(list, name)
			case cp.now().Sub(g.at) < settle:
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
