package agent

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/mantlet/mantlet/agent/verdicts"
)

// ownIdentity keeps the pod's certificate that of the pod. The labels of a running pod may change, and its identity with them; what
// the control plane then sends are the verdicts of another subject, and by that the agent knows: nothing is polled.
type ownIdentity struct {
	verdicts interface {
		Current() *verdicts.Current
		Changed() <-chan struct{}
	}
	source renewable
	held   func() (spiffeid.ID, <-chan struct{}) // of the certificate that Envoy has
	log    *slog.Logger

	again     time.Duration // of refused
	notBefore time.Time
}

// renewable is an svid.Source that can be told to renew; *svid.Builtin is one.
type renewable interface {
	GetX509SVID() (*x509svid.SVID, error)
	Updated() <-chan struct{}
	Renew()
}

// Between two renewals that brought the old identity again: the control plane's replica that signs may know of the change later than
// the one that serves the verdicts.
const (
	firstAgain = 100 * time.Millisecond
	lastAgain  = 5 * time.Second
	// lastRefused is that pause where the control plane refuses the pod, for whatever reason.
	lastRefused = time.Minute
)

// refused is told that the control plane takes the certificate no more. The pod may have been relabelled while none was there; then there are no
// other verdicts to tell by, as they come to who shows the new identity. It is called by one goroutine.
func (o *ownIdentity) refused() {
	now := time.Now()
	if now.Before(o.notBefore) {
		return
	}
	if now.Sub(o.notBefore) > lastRefused { // another occasion
		o.again = firstAgain
	}
	o.log.Info("agent: the control plane refuses the pod's certificate, or its token; the certificate is renewed")
	o.source.Renew()
	o.notBefore, o.again = now.Add(o.again), min(2*o.again, lastRefused)
}

// follow renews the certificate whenever the verdicts are for another identity than it is, until ctx ends.
func (o *ownIdentity) follow(ctx context.Context) {
	again, notBefore := firstAgain, time.Time{}
	for {
		verdictsChanged, renewed := o.verdicts.Changed(), o.source.Updated()
		var due <-chan time.Time
		if have, want, differ := o.differ(); !differ {
			again, notBefore = firstAgain, time.Time{}
		} else {
			if !time.Now().Before(notBefore) {
				o.log.Info("agent: the pod has another identity now; its certificate is renewed", "was", have.String(), "is", want.String())
				o.source.Renew()
				notBefore, again = time.Now().Add(again), min(2*again, lastAgain)
			}
			due = time.After(time.Until(notBefore))
		}
		select {
		case <-ctx.Done():
			return
		case <-verdictsChanged:
		case <-renewed:
		case <-due:
		}
	}
}

// differ compares the certificate with the verdicts. Where one of them is missing there is nothing to compare.
func (o *ownIdentity) differ() (have, want spiffeid.ID, differ bool) {
	v := o.verdicts.Current()
	s, err := o.source.GetX509SVID()
	if v == nil || err != nil {
		return spiffeid.ID{}, spiffeid.ID{}, false
	}
	return s.ID, v.Verdicts.Subject, s.ID != v.Verdicts.Subject
}

// missing says why what Envoy shows is not the certificate of the pod's identity, or is empty where it is; and returns a channel that is closed
// when Envoy has another one. That of the verdicts has a channel of its own.
func (o *ownIdentity) missing() (why string, changed <-chan struct{}) {
	held, changed := o.held()
	v := o.verdicts.Current()
	switch {
	case v == nil: // said elsewhere
		return "", changed
	case held.IsZero():
		return "envoy has no certificate", changed
	case held != v.Verdicts.Subject:
		return fmt.Sprintf("the pod is %s now, and envoy has the certificate of %s", v.Verdicts.Subject, held), changed
	}
	return "", changed
}
