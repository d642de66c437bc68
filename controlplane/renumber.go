package controlplane

import (
	"errors"
	"net/netip"
	"slices"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/xds/server"
)

// Renumber gives the cluster other ranges of pod and Service addresses, and takes over the whole set of its objects once more: what is a pod's
// address and what is outside decides about every verdict. Everybody's are compiled anew, and those whose bytes differ are sent. What is
// retired stays so.
func (cp *ControlPlane) Renumber(pods, services []netip.Prefix, o *policy.Objects) error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	cp.policy.PodNetwork, cp.policy.ServiceNetwork = slices.Clone(pods), slices.Clone(services)
	cp.cluster = slices.Concat(pods, services)
	before := cp.index
	cp.changes++
	cp.moves++
	cp.index = policy.NewIndex(cp.policy)
	err := cp.index.ApplyAll(o)
	cp.required.load(o.Namespaces)
	cp.index.Inherit(before)
	for _, name := range before.PodNames() {
		was, _ := before.Pod(name)
		if is, ok := cp.index.Pod(name); !ok || !is.Sidecar || is.UID != was.UID {
			cp.xds.Forget(server.Client(name))
		}
	}
	clear(cp.hashes)
	clear(cp.rendered)
	clear(cp.packets)
	clear(cp.nodes)
	clear(cp.outbound) // which holds the ranges too
	if !cp.loaded {
		return err
	}
	cp.log.Info("the ranges of the cluster's addresses have changed; all verdicts are compiled anew", "pods", pods, "services", services)
	err = errors.Join(err, cp.publish(policy.Delta{Subjects: cp.index.SubjectKeys()}))
	stale := map[string]bool{}
	for name := range cp.demand.asked {
		stale[name] = true
	}
	cp.refresh(stale)
	return err
}
