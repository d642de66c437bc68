package policy

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/verdict"
)

// nodes are the addresses at which node ports are to be had: those that the Node objects name (core/v1 NodeStatus.addresses). That a node has others
// the API does not say.
type nodes struct {
	addrs map[string][]netip.Addr        // by node, sorted
	at    map[netip.Addr]map[string]bool // nodes by address
}

func newNodes() nodes {
	return nodes{addrs: map[string][]netip.Addr{}, at: map[netip.Addr]map[string]bool{}}
}

// setNode takes a node over, or out: one without zone and addresses. Pods of another zone may have other endpoints of services than before, and
// addresses that are no node's any more stand for themselves.
func (x *Index) setNode(o *corev1.Node, c *change) {
	x.setZone(o.Name, o.Labels[corev1.LabelTopologyZone], c)
	var addrs []netip.Addr
	for _, a := range o.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); err == nil { // else a name
			addrs = append(addrs, ip.Unmap().WithZone(""))
		}
	}
	addrs = sortedAddrs(addrs)
	n := &x.nodes
	if slices.Equal(n.addrs[o.Name], addrs) {
		return
	}
	c.nodesMoved = true
	x.touchHostPorts(o.Name, c)
	for _, a := range n.addrs[o.Name] {
		c.addrs[a] = true
		delete(n.at[a], o.Name)
		if len(n.at[a]) == 0 {
			delete(n.at, a)
		}
	}
	delete(n.addrs, o.Name)
	if len(addrs) > 0 {
		n.addrs[o.Name] = addrs
	}
	for _, a := range addrs {
		c.addrs[a] = true
		if n.at[a] == nil {
			n.at[a] = map[string]bool{}
		}
		n.at[a][o.Name] = true
	}
}

// setZone says in which zone a node is; "": in none that is known.
func (x *Index) setZone(node, zone string, c *change) {
	if x.zones[node] == zone {
		return
	}
	x.zones[node] = zone
	if zone == "" {
		delete(x.zones, node)
	}
	for key, p := range x.pods {
		if p.node == node {
			c.pods[key] = true
		}
	}
}

// nodeAt is the node that has an address, to a client: its own, or the first by name that says so.
func (x *Index) nodeAt(a netip.Addr, client *pod) (name string, ok bool) {
	if slices.Contains(client.hostIPs, a) {
		return client.node, true
	}
	for node := range x.nodes.at[a] {
		if !ok || node < name {
			name, ok = node, true
		}
	}
	return name, ok
}

// isNodePort reports whether a node has an address at which a port is a service's.
func (x *Index) isNodePort(client *pod, proto verdict.Protocol, a netip.Addr, port uint16) bool {
	_, ok := x.nodeAt(a, client)
	return ok && len(x.services.onNode[portKey{proto, port}]) > 0
}

// atNodePort is the service that a port of a node stands for. internalTrafficPolicy is about the cluster IP. With externalTrafficPolicy Local a node
// has its own endpoints alone, also for clients inside the cluster (core/v1 ServiceSpec says so of node ports, and not of other addresses).
func (x *Index) atNodePort(proto verdict.Protocol, to netip.AddrPort, node string, from place) (Destination, bool) {
	v := newest(x.services.onNode[portKey{proto, to.Port()}])
	if v == nil {
		return Destination{}, false
	}
	atNode := *v
	atNode.local = v.localAtNode
	if v.localAtNode && from != anywhereInCluster {
		from = place{node: node}
	}
	for _, p := range v.ports {
		if p.onNode == to.Port() && p.protocol == proto {
			return x.behind(&atNode, p, to.Addr().Unmap().Is4(), from), true
		}
	}
	return Destination{}, false
}

// nodePortsFor lists what a pod may use of the node ports of a protocol, at the addresses of all nodes. Where every node has the same endpoints
// policy is asked once for all of them.
func (x *Index) nodePortsFor(p *pod, proto verdict.Protocol) (out []ServicePort) {
	addrs := map[netip.Addr]bool{}
	for _, a := range p.hostIPs {
		addrs[a] = true
	}
	for a := range x.nodes.at {
		addrs[a] = true
	}
	type answer struct {
		v4   bool
		node string // where it makes a difference
	}
	for at, claims := range x.services.onNode {
		if at.protocol != proto {
			continue
		}
		local := newest(claims).localAtNode
		known := map[answer][]netip.AddrPort{}
		for a := range addrs {
			if x.owner(a) != nil || x.services.owner(a) != nil {
				continue // a pod's, or a service's, whatever a node says
			}
			to := netip.AddrPortFrom(a, at.number)
			if x.externalAt(proto, a, at.number) != nil {
				continue // listed as that
			}
			k := answer{v4: a.Is4()}
			if local {
				k.node, _ = x.nodeAt(a, p)
			}
			endpoints, ok := known[k]
			if !ok {
				d, _ := x.DestinationFor(p.key, proto, to)
				for _, e := range x.Admitted(p.key, d) {
					endpoints = append(endpoints, e.Addr)
				}
				known[k] = endpoints
			}
			out = append(out, ServicePort{Addr: to, Endpoints: endpoints, External: true})
		}
	}
	return out
}

// NodePorts lists the ports of nodes, of any protocol, at which services are to be had; sorted.
func (x *Index) NodePorts() []uint16 {
	var out []uint16
	for at := range x.services.onNode {
		out = append(out, at.number)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// nodePortsMoved reports whether nodes' addresses have changed, and packets name them.
func (x *Index) nodePortsMoved(c *change) bool {
	if !c.nodesMoved {
		return false
	}
	for at := range x.services.onNode {
		if at.protocol != verdict.TCP {
			return true
		}
	}
	return false
}
