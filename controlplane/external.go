package controlplane

import (
	"errors"
	"net/netip"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
)

// network is what a pod's sidecar, as all on its node, knows of the network.
func (cp *ControlPlane) network(p policy.Pod) *verdict.Network {
	return &verdict.Network{Cluster: cp.cluster, Node: p.NodeIPs, Services: cp.index.External(), HostPorts: cp.index.HostPorts(p.Name), NodePorts: cp.nodePorts}
}

// forgetNetworks forgets what was rendered of networks: the external addresses of services are others.
func (cp *ControlPlane) forgetNetworks() {
	clear(cp.nodes)
	clear(cp.outbound)
	for _, r := range cp.rendered {
		clear(r.sets)
	}
}

// publishAll publishes to all sidecars that the present publish has not reached yet.
func (cp *ControlPlane) publishAll() error {
	var errs []error
	for _, name := range cp.index.PodNames() {
		if p, ok := cp.index.Pod(name); ok {
			errs = append(errs, cp.publishPod(p))
		}
	}
	return errors.Join(errs...)
}

// warnContests says so where an external address of a service is not, or not only, its own. Whoever may write a Service may name any address
// (CVE-2020-8554); what sidecars make of it is no matter of chance, but what nodes do may be.
func (cp *ControlPlane) warnContests(a netip.Addr) {
	for _, c := range cp.index.Contests(a) {
		cp.log.Warn("an external address of a service is somebody else's; sidecars lead to the one who has it, nodes maybe to the other",
			"address", c.Addr, "protocol", c.Protocol, "has", c.Holder, "claimed by", c.Others)
	}
}
