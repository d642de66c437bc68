package controlplane

import (
	"context"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/xds/server"
)

// retiredMargin is added to the validity of certificates, for what may happen after a change was seen here: another replica signs for the
// old identity because it has not heard yet, clocks differ, a TLS session is resumed past the certificate's end.
const retiredMargin = 15 * time.Minute

// RetiredFor is how long an identity that is retired now is refused at most, where certificates are valid for ttl (zero: ca.DefaultTTL) and clocks agree.
func RetiredFor(ttl time.Duration) time.Duration {
	if ttl == 0 {
		ttl = ca.DefaultTTL
	}
	return ttl + retiredMargin
}

// Records keeps what is retired beyond this process; *retired.Records does so in a cluster.
//
// What holds whichever process dies when: a pod has a certificate of another identity only once it is on record that it no longer has the one
// before. Sidecars are told to refuse that at once, record or not. If nobody lives long enough to make the record, the pod still has no other
// certificate than the old one, and shows it when it comes to whoever starts next (ControlPlane.shown).
type Records interface {
	// Record puts a Retirement on record, sooner or later. It does not wait.
	Record(policy.Retirement)
	// Await waits until all that was given to Record of the pod with this UID is on record. An error says why it is not, or not yet.
	Await(ctx context.Context, uid string) error
}

// present are the pods that objects speak of, as they are before a change.
func (cp *ControlPlane) present(lists ...[]metav1.Object) map[string]policy.Pod {
	out := map[string]policy.Pod{}
	for _, list := range lists {
		for _, obj := range list {
			o, ok := obj.(*corev1.Pod)
			if !ok {
				continue
			}
			if p, ok := cp.index.Pod(o.Namespace + "/" + o.Name); ok {
				out[p.Name] = p
			}
		}
	}
	return out
}

// succeed looks at what has become of pods. One that runs on with another identity is refused under the old one from its addresses, until no
// certificate for that can be good any more: any of them was signed before now. One that is another pod of the same name shares
// nothing with it: the stream of the pod before it is ended.
func (cp *ControlPlane) succeed(before map[string]policy.Pod) (touched []policy.Delta) {
	for name, was := range before {
		is, ok := cp.index.Pod(name)
		switch {
		case !ok:
		case is.UID != was.UID:
			cp.xds.Forget(server.Client(name))
		case was.Sidecar && is.Subject.ID != was.Subject.ID:
			touched = append(touched, cp.retire(was, was.Subject.ID)...)
			cp.log.Info("a running pod has another identity; the old one is refused from its addresses",
				"pod", name, "was", was.Subject.ID.String(), "is", is.Subject.ID.String())
		}
	}
	cp.awaitExpiry()
	return touched
}

// retire refuses an identity from a pod's addresses, and has that recorded.
func (cp *ControlPlane) retire(p policy.Pod, id spiffeid.ID) (touched []policy.Delta) {
	end := cp.now().Add(cp.svidTTL)
	if g, ok := cp.given[p.Name]; ok && g.uid == p.UID && g.until.After(end) {
		end = g.until // by a clock that ran ahead, or with another validity
	}
	r := policy.Retirement{Pod: p.Name, UID: p.UID, ID: id, Addrs: p.Addrs, Until: end.Add(retiredMargin)}
	for _, a := range r.Addrs {
		touched = append(touched, cp.index.Retire(r.ID, a, r.Until))
	}
	if cp.records != nil && len(r.Addrs) > 0 {
		cp.records.Record(r)
	}
	return touched
}

// Recall takes over what others have retired, or this process before it: it adds to what is known, and takes nothing away. Before Load it is not
// published; what is to be known from the first moment is recalled before.
func (cp *ControlPlane) Recall(retirements []policy.Retirement, bindings []policy.Binding) error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	var touched []policy.Delta
	now := cp.now()
	for _, r := range retirements {
		for _, a := range r.Addrs {
			if is, ok := cp.index.Retired(r.ID, a); r.Until.After(now) && (!ok || is.Before(r.Until)) {
				touched = append(touched, cp.index.Retire(r.ID, a, r.Until))
			}
		}
	}
	for _, b := range bindings {
		if b.Until.After(now) {
			touched = append(touched, cp.index.Bind(b.Namespace, b.Until))
		}
	}
	return cp.takeOver(touched)
}

// takeOver publishes what has been retired beside a change of objects.
func (cp *ControlPlane) takeOver(touched []policy.Delta) error {
	cp.awaitExpiry()
	d := policy.Merge(touched)
	if !cp.loaded || len(d.Subjects) == 0 {
		return nil
	}
	cp.changes++
	return cp.publish(d)
}

// shown is told of a pod that shows a certificate of another identity than it has. If that was signed before this control plane knew any pod, the
// pod was relabelled while nobody looked: the identity is retired like any other. (One that was signed since may be the pod's next, of which
// this replica has not heard yet.)
func (cp *ControlPlane) shown(pod attest.Pod, leaf *x509.Certificate) {
	id, err := x509svid.IDFromCert(leaf)
	if err != nil || !leaf.NotBefore.Add(ca.Skew).Before(cp.began) {
		return
	}
	cp.mu.Lock()
	defer cp.mu.Unlock()
	p, ok := cp.index.Pod(pod.String())
	if !ok || p.UID != pod.UID || cp.closed || !couldHave(p.Subject.ID, id) {
		return
	}
	for _, a := range p.Addrs {
		if _, known := cp.index.Retired(id, a); known {
			return
		}
	}
	cp.log.Info("a pod shows the certificate of an identity that it had before this control plane started; that is refused from its addresses",
		"pod", p.Name, "was", id.String(), "is", p.Subject.ID.String())
	if err := cp.takeOver(cp.retire(p, id)); err != nil {
		cp.log.Error("an identity that a pod had before cannot be refused everywhere", "pod", p.Name, "error", err)
	}
}

// couldHave reports whether a pod of one identity can have had another: namespace and service account are a pod's for life.
func couldHave(is, was spiffeid.ID) bool {
	a, errA := identity.Parse(is)
	b, errB := identity.Parse(was)
	return errA == nil && errB == nil && is != was && a.Namespace == b.Namespace && a.ServiceAccount == b.ServiceAccount
}

// recorded waits until it is on record what a pod no longer is, before it is given a certificate of what it is.
func (cp *ControlPlane) recorded(ctx context.Context, pod attest.Pod) error {
	if cp.records == nil {
		return nil
	}
	if err := cp.records.Await(ctx, pod.UID); err != nil {
		return fmt.Errorf("the pod has another identity, and that it no longer has the one before is not on record: %w", err)
	}
	return nil
}

// awaitExpiry has the control plane forget what was retired when its time has come. To be late is no harm: it refuses what has ended by itself.
func (cp *ControlPlane) awaitExpiry() {
	if cp.expiry != nil {
		cp.expiry.Stop()
		cp.expiry = nil
	}
	next, ok := cp.index.NextExpiry()
	if !ok || cp.closed {
		return
	}
	cp.expiry = time.AfterFunc(next.Sub(cp.now()), func() {
		cp.mu.Lock()
		defer cp.mu.Unlock()
		if cp.closed {
			return
		}
		cp.changes++
		d := cp.index.Expire(cp.now())
		if cp.loaded {
			if err := cp.publish(d); err != nil {
				cp.log.Error("what was retired has ended, and the verdicts without it cannot be published", "error", err)
			}
		}
		cp.awaitExpiry()
	})
}

// Close ends all streams, and whatever waits.
func (cp *ControlPlane) Close() {
	cp.mu.Lock()
	cp.closed = true
	cp.awaitExpiry()
	cp.mu.Unlock()
	cp.xds.Close()
}
