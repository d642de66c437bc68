package controlplane

import (
	"errors"
	"net/netip"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// publishHostPorts publishes to the sidecars on the nodes of which host ports are others, or somebody else's; what is asked about there is stale. Who is on
// another node is not told.
func (cp *ControlPlane) publishHostPorts(ports []policy.HostPort, stale map[string]bool) error {
	var errs []error
	told := map[string]bool{}
	for _, at := range ports {
		cp.demand.collect(stale, hostPortKey(at.Node, at.Port))
		if pods := cp.index.Rivals(at); len(pods) > 0 {
			cp.log.Warn("a host port is claimed by several pods on its node; sidecars lead to the first, the node maybe to another",
				"node", at.Node, "port", at.Port, "protocol", at.Protocol, "pods", pods)
		}
		if told[at.Node] {
			continue
		}
		told[at.Node] = true
		for _, name := range cp.index.PodsOn(at.Node) {
			if p, ok := cp.index.Pod(name); ok {
				errs = append(errs, cp.publishPod(p))
			}
		}
	}
	return errors.Join(errs...)
}

// portsKey is equal for equal ports of addresses.
func portsKey(ports []netip.AddrPort) string {
	var b []byte
	for _, p := range ports {
		b = append(p.AppendTo(b), ' ')
	}
	return string(b)
}
