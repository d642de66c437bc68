package replica

import (
	"context"
	"time"
)

// Grace is how long a replica that is asked to end goes on serving in a cluster. Who takes its address out of a Service are the EndpointSlice controller,
// which does so as soon as the pod is to be deleted, and then each node's kube-proxy, which is told by a watch and writes its rules once a second at most
// by itself (--iptables-min-sync-period): two seconds on a busy node, and as long again for sidecars to go.
const Grace = 5 * time.Second

// LongestEnd is how long a replica takes to end at most, from the signal on: what is under way when the grace is over is finished. A pod's
// terminationGracePeriodSeconds has to be longer.
const LongestEnd = Grace + stopPatience

// leave goes on serving for the grace, or until ctx ends. Readiness says at once that nobody is to come. In the first quarter everything is as
// before, as new connections still arrive where the address is known; in the next half the sidecars are sent away one by one, and new ones with them;
// the rest is for certificates that are being signed and pods that are being admitted. A replica that has served nobody has nothing to wait for.
func (r *replica) leave(ctx context.Context) {
	r.leaving.Store(true)
	cp := r.plane.Load()
	if !r.serving.Load() || cp == nil || r.cfg.Grace <= 0 {
		return
	}
	r.cfg.Log.Info("asked to end: not ready any more, and serving on while sidecars and the API server go to other replicas", "for", r.cfg.Grace)
	over := time.NewTimer(r.cfg.Grace)
	defer over.Stop()
	known := time.NewTimer(r.cfg.Grace / 4)
	defer known.Stop()
	select {
	case <-ctx.Done():
		return
	case <-known.C:
	}
	if err := cp.Server().Drain(ctx, r.cfg.Grace/2); err != nil {
		return // ctx has ended
	}
	select {
	case <-ctx.Done():
	case <-over.C:
	}
}
