package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/verdict"
)

// hosts are the nodes as pods are on them, with the ports of the node that pods ask for (core/v1 ContainerPort.hostPort). The node sends on to such a pod
// what comes to that port, from its other pods with its own address where the CNI plugin masquerades: past the ingress policy of the pod, which admits
// its node. So to a pod on the same node a host port is a destination, as a node port is. To others it is a port of another node, at which their ipBlocks
// judge.
//
// A pod claims its host ports from the moment at which it is scheduled until it has ended: CNI's portmap leads them to it as long as its sandbox is
// there, whatever its readiness, and nobody may learn of them later than that. Before the pod has an address nothing is behind them.
type hosts struct {
	pods   map[string]map[string]*pod          // by node and key
	at     map[netip.Addr]map[string]int       // how many pods on a node say that it has an address
	claims map[string]map[portKey][]*hostClaim // by node; of whoever has no node nobody knows where
}

// hostClaim is a pod's to a port of its node.
type hostClaim struct {
	pod *pod
	hostPort
}

// hostPort is a port of the node that a pod asks for.
type hostPort struct {
	portKey
	addr netip.Addr // of the node; zero, or unspecified: any
	to   uint16     // the pod's own port
}

// HostPort is a port of a node that a pod asks for.
type HostPort struct {
	Node     string
	Protocol verdict.Protocol
	Port     uint16
}

func (p HostPort) compare(q HostPort) int {
	return cmp.Or(strings.Compare(p.Node, q.Node), cmp.Compare(p.Protocol, q.Protocol), cmp.Compare(p.Port, q.Port))
}

func newHosts() hosts {
	return hosts{pods: map[string]map[string]*pod{}, at: map[netip.Addr]map[string]int{}, claims: map[string]map[portKey][]*hostClaim{}}
}

// hostPorts lists the host ports of a pod, sorted. Init containers count where they run as long as the pod does. What the API server would refuse is none.
func hostPorts(spec *corev1.PodSpec) []hostPort {
	var out []hostPort
	for c := range lasting(spec) {
		for _, p := range c.Ports {
			proto, err := verdict.ParseProtocol(string(p.Protocol))
			if err != nil || p.HostPort < 1 || p.HostPort > 65535 || p.ContainerPort < 1 || p.ContainerPort > 65535 {
				continue
			}
			h := hostPort{portKey: portKey{proto, uint16(p.HostPort)}, to: uint16(p.ContainerPort)}
			if p.HostIP != "" {
				if h.addr, err = netip.ParseAddr(p.HostIP); err != nil {
					continue
				}
				h.addr = h.addr.Unmap()
			}
			out = append(out, h)
		}
	}
	slices.SortFunc(out, hostPort.compare)
	return slices.Compact(out)
}

func (h hostPort) compare(o hostPort) int {
	return cmp.Or(cmp.Compare(h.protocol, o.protocol), cmp.Compare(h.number, o.number), h.addr.Compare(o.addr), cmp.Compare(h.to, o.to))
}

// holds reports whether a claim is to an address of the node: to the one that it names, else to all of the families in which the pod has an address.
func (c *hostClaim) holds(a netip.Addr) bool {
	if c.addr.IsValid() && !c.addr.IsUnspecified() {
		return c.addr == a
	}
	return len(c.pod.ips) == 0 || sourceAddr(c.pod, a).IsValid()
}

// enter notes where a pod is, and what it claims there.
func (h *hosts) enter(p *pod, c *change) {
	if p.node == "" {
		return
	}
	if h.pods[p.node] == nil {
		h.pods[p.node] = map[string]*pod{}
	}
	h.pods[p.node][p.key] = p
	for _, a := range p.hostIPs {
		if h.at[a] == nil {
			h.at[a] = map[string]int{}
		}
		h.at[a][p.node]++
	}
	for _, hp := range p.hostPorts {
		if h.claims[p.node] == nil {
			h.claims[p.node] = map[portKey][]*hostClaim{}
		}
		h.claims[p.node][hp.portKey] = append(h.claims[p.node][hp.portKey], &hostClaim{p, hp})
		c.hostPorts[HostPort{p.node, hp.protocol, hp.number}] = true
	}
}

func (h *hosts) leave(p *pod, c *change) {
	if p.node == "" {
		return
	}
	delete(h.pods[p.node], p.key)
	if len(h.pods[p.node]) == 0 {
		delete(h.pods, p.node)
	}
	for _, a := range p.hostIPs {
		if h.at[a][p.node]--; h.at[a][p.node] == 0 {
			delete(h.at[a], p.node)
		}
		if len(h.at[a]) == 0 {
			delete(h.at, a)
		}
	}
	for _, hp := range p.hostPorts {
		c.hostPorts[HostPort{p.node, hp.protocol, hp.number}] = true
		rest := slices.DeleteFunc(slices.Clone(h.claims[p.node][hp.portKey]), func(is *hostClaim) bool { return is.pod == p })
		if len(rest) > 0 {
			h.claims[p.node][hp.portKey] = rest
			continue
		}
		delete(h.claims[p.node], hp.portKey)
		if len(h.claims[p.node]) == 0 {
			delete(h.claims, p.node)
		}
	}
}

// touchHostPorts is for a node that has other addresses than before.
func (x *Index) touchHostPorts(node string, c *change) {
	for at := range x.hosts.claims[node] {
		c.hostPorts[HostPort{node, at.protocol, at.number}] = true
	}
}

// ownNode lists the addresses of a pod's node: those from which it speaks to the pod, and those that the Node names. Sorted.
func (x *Index) ownNode(p *pod) []netip.Addr {
	return sortedAddrs(slices.Concat(p.hostIPs, x.nodes.addrs[p.node]))
}

func (x *Index) isOwnNode(p *pod, a netip.Addr) bool {
	return slices.Contains(p.hostIPs, a) || x.nodes.at[a][p.node]
}

// NodesAt lists the nodes that have an address, to whoever is on them; sorted.
func (x *Index) NodesAt(a netip.Addr) (out []string) {
	a = a.Unmap()
	for node := range x.nodes.at[a] {
		out = append(out, node)
	}
	for node := range x.hosts.at[a] {
		out = append(out, node)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// PodsOn lists the pods on a node, "namespace/name", sorted.
func (x *Index) PodsOn(node string) []string {
	out := make([]string, 0, len(x.hosts.pods[node]))
	for key := range x.hosts.pods[node] {
		out = append(out, key)
	}
	slices.Sort(out)
	return out
}

// claimsAt are the claims to a port at an address of a node, the one that counts first.
//
// Of several the pod has it that was created first, then the one that is first by name: kubelet refuses the later one, and portmap's rule of the earlier
// one comes first. Who has no address yet comes after all who have.
func (h *hosts) claimsAt(node string, proto verdict.Protocol, to netip.AddrPort) (out []*hostClaim) {
	a := to.Addr().Unmap()
	for _, c := range h.claims[node][portKey{proto, to.Port()}] {
		if c.holds(a) {
			out = append(out, c)
		}
	}
	addressless := func(c *hostClaim) int {
		if len(c.pod.ips) == 0 {
			return 1
		}
		return 0
	}
	slices.SortFunc(out, func(c, d *hostClaim) int {
		return cmp.Or(addressless(c)-addressless(d), c.pod.created.Compare(d.pod.created), strings.Compare(c.pod.key, d.pod.key), c.compare(d.hostPort))
	})
	return out
}

// isHostPort reports whether a pod's own node has an address at which a port is a pod's. An address of a pod, and a cluster IP, stay what they are.
func (x *Index) isHostPort(client *pod, proto verdict.Protocol, a netip.Addr, port uint16) bool {
	return x.isOwnNode(client, a) && len(x.claims[a]) == 0 && x.services.owner(a) == nil && len(x.hosts.claimsAt(client.node, proto, netip.AddrPortFrom(a, port))) > 0
}

// atHostPort is what a port of a node stands for to its own pods: one pod, or nobody as long as that has no address of its own.
func (x *Index) atHostPort(proto verdict.Protocol, to netip.AddrPort, node string) Destination {
	d := Destination{Protocol: proto, own: true} // to a pod on another node it is another one
	for i, c := range x.hosts.claimsAt(node, proto, to) {
		a := sourceAddr(c.pod, to.Addr().Unmap())
		switch e := x.endpoint(netip.AddrPortFrom(a, c.to)); {
		case !a.IsValid():
		case i == 0 && e.Pod == c.pod.key:
			d.Endpoints = append(d.Endpoints, e)
		default:
			d.Others = append(d.Others, e)
		}
	}
	return d
}

// atAnyHostPort holds all that atHostPort may say to anybody.
func (x *Index) atAnyHostPort(proto verdict.Protocol, to netip.AddrPort) Destination {
	out := Destination{Protocol: proto}
	for _, node := range x.NodesAt(to.Addr()) {
		d := x.atHostPort(proto, to, node)
		out.Others = slices.Concat(out.Others, d.Endpoints, d.Others)
	}
	return out
}

// HostPorts lists the host ports of TCP on a pod's ("namespace/name") own node, at all of its addresses: what its sidecar has to ask about. Sorted.
func (x *Index) HostPorts(client string) (out []netip.AddrPort) {
	p := x.pods[client]
	if p == nil || len(x.hosts.claims[p.node]) == 0 {
		return nil
	}
	for _, a := range x.ownNode(p) {
		for at := range x.hosts.claims[p.node] {
			if to := netip.AddrPortFrom(a, at.number); at.protocol == verdict.TCP && len(x.hosts.claimsAt(p.node, verdict.TCP, to)) > 0 {
				out = append(out, to)
			}
		}
	}
	slices.SortFunc(out, netip.AddrPort.Compare)
	return out
}

// hostPortsFor lists what a pod may use of the host ports of a protocol on its own node.
func (x *Index) hostPortsFor(p *pod, proto verdict.Protocol) (out []ServicePort) {
	if len(x.hosts.claims[p.node]) == 0 {
		return nil
	}
	for _, a := range x.ownNode(p) {
		for at := range x.hosts.claims[p.node] {
			to := netip.AddrPortFrom(a, at.number)
			if at.protocol != proto || !x.isHostPort(p, proto, a, at.number) || x.externalAt(proto, a, at.number) != nil || x.isNodePort(p, proto, a, at.number) {
				continue // the last two are listed as what they are
			}
			sp := ServicePort{Addr: to, External: true}
			for _, e := range x.Admitted(p.key, x.atHostPort(proto, to, p.node)) {
				sp.Endpoints = append(sp.Endpoints, e.Addr)
			}
			out = append(out, sp)
		}
	}
	return out
}

// servesPackets reports whether pods on a node have host ports of UDP or SCTP.
func (h *hosts) servesPackets(node string) bool {
	for at := range h.claims[node] {
		if at.protocol != verdict.TCP {
			return true
		}
	}
	return false
}

// packetsTouched marks the packets of the pods on nodes of which host ports of UDP or SCTP are touched, or the pods behind them, or their policy.
func (h *hosts) packetsTouched(x *Index, c *change) {
	if len(h.claims) == 0 && len(c.hostPorts) == 0 { // in nearly all clusters, at each change
		return
	}
	nodes := map[string]bool{}
	for at := range c.hostPorts {
		if at.Protocol != verdict.TCP {
			nodes[at.Node] = true
		}
	}
	behind := func(p *pod) {
		if p != nil && slices.ContainsFunc(p.hostPorts, func(hp hostPort) bool { return hp.protocol != verdict.TCP }) {
			nodes[p.node] = true
		}
	}
	for name := range c.pods {
		behind(x.pods[name])
	}
	for key := range c.subjects {
		for _, p := range x.subjects[key].pods {
			behind(p)
		}
	}
	for node := range nodes {
		for name := range h.pods[node] {
			c.packets[name] = true
		}
	}
}

// ClaimedHostPorts lists those that pods claim, sorted by node, protocol and port.
func (x *Index) ClaimedHostPorts() (out []HostPort) {
	for node, claims := range x.hosts.claims {
		for at := range claims {
			out = append(out, HostPort{node, at.protocol, at.number})
		}
	}
	slices.SortFunc(out, HostPort.compare)
	return out
}

// Rivals lists the pods ("namespace/name") that claim a host port at one and the same address, the one that has it first; nil: there are no two.
func (x *Index) Rivals(at HostPort) (out []string) {
	if len(x.hosts.claims[at.Node][portKey{at.Protocol, at.Port}]) < 2 {
		return nil
	}
	addrs := slices.Clone(x.nodes.addrs[at.Node])
	for _, p := range x.hosts.pods[at.Node] {
		addrs = append(addrs, p.hostIPs...)
	}
	for _, a := range sortedAddrs(addrs) {
		var names []string
		for _, c := range x.hosts.claimsAt(at.Node, at.Protocol, netip.AddrPortFrom(a, at.Port)) {
			if !slices.Contains(names, c.pod.key) {
				names = append(names, c.pod.key)
			}
		}
		if len(names) > 1 {
			return names
		}
	}
	return nil
}
