package verdict

import "net/netip"

// DefaultNodePorts is the API server's default --service-node-port-range.
var DefaultNodePorts = PortRange{First: 30000, Last: 32767}

// Network is what a sidecar has to know of the network around its pod. Its addresses are never IPv4-mapped ones.
type Network struct {
	Cluster []netip.Prefix // where sidecars find each other: pods and Services
	Node    []netip.Addr   // the pod's own
	// Services are the external addresses of Services, with their TCP ports, sorted: asked about as what is inside Cluster, whosever the address is.
	Services []netip.AddrPort
	// NodePorts are asked about at every address; zero: DefaultNodePorts.
	NodePorts PortRange
}

// NodePortRange is NodePorts, or the default.
func (n *Network) NodePortRange() PortRange {
	if n.NodePorts == (PortRange{}) {
		return DefaultNodePorts
	}
	return n.NodePorts
}
