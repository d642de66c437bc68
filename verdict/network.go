package verdict

import (
	"net/netip"
	"slices"
)

// DefaultNodePorts is the API server's default --service-node-port-range.
var DefaultNodePorts = PortRange{First: 30000, Last: 32767}

// Network is what a sidecar has to know of the network around its pod. Its addresses are never IPv4-mapped ones.
type Network struct {
	Cluster []netip.Prefix // where sidecars find each other: pods and Services
	Node    []netip.Addr   // the pod's own
	// Services are the external addresses of Services, with their TCP ports, sorted: asked about as what is inside Cluster, whosever the address is.
	Services []netip.AddrPort
	// HostPorts are the host ports of pods on the pod's own node, over TCP and at the node's addresses, sorted: asked about like Services. On the wire they are
	// among them, so that whoever reads a Network has none.
	HostPorts []netip.AddrPort
	// NodePorts are asked about at every address; zero: DefaultNodePorts.
	NodePorts PortRange
}

// Asked lists all that is asked about beside Cluster and NodePorts: Services and HostPorts, sorted, none twice.
func (n *Network) Asked() []netip.AddrPort {
	if len(n.HostPorts) == 0 {
		return n.Services
	}
	all := slices.Concat(n.Services, n.HostPorts)
	slices.SortFunc(all, netip.AddrPort.Compare)
	return slices.Compact(all)
}

// NodePortRange is NodePorts, or the default.
func (n *Network) NodePortRange() PortRange {
	if n.NodePorts == (PortRange{}) {
		return DefaultNodePorts
	}
	return n.NodePorts
}
