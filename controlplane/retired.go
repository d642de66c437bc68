package controlplane

import (
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/xds/server"
)

// retiredMargin is added to the validity of certificates, for what may happen after a change was seen here: another replica signs for the
// old identity because it has not heard yet, clocks differ, a TLS session is resumed past the certificate's end.
const retiredMargin = 15 * time.Minute

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
//
// What is retired lives in this process. One that starts later does not know of it, and then only the certificate's end helps.
func (cp *ControlPlane) succeed(before map[string]policy.Pod) (touched []policy.Delta) {
	now := cp.now()
	for name, was := range before {
		is, ok := cp.index.Pod(name)
		switch {
		case !ok:
		case is.UID != was.UID:
			cp.xds.Forget(server.Client(name))
		case was.Sidecar && is.Subject.ID != was.Subject.ID:
			for _, a := range was.Addrs {
				touched = append(touched, cp.index.Retire(was.Subject.ID, a, now.Add(cp.svidTTL+retiredMargin)))
			}
			cp.log.Info("a running pod has another identity; the old one is refused from its addresses",
				"pod", name, "was", was.Subject.ID.String(), "is", is.Subject.ID.String())
		}
	}
	cp.awaitExpiry()
	return touched
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
		if err := cp.publish(cp.index.Expire(cp.now())); err != nil {
			cp.log.Error("what was retired has ended, and the verdicts without it cannot be published", "error", err)
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
