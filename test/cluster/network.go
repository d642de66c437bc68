package cluster

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The network of cluster number N, which is the first that is free on this machine. The control plane's machine has a bridge, to which nodes and
// host are connected:
//
//	host 172.30.N.254 ──── mantletN ─┐
//	control plane 172.30.N.1 ─── bridge ─── eth0 172.30.N.11 node1 ─── cni0 ─── pods of 10.(200+N).x.0/24
//	                                 └───── eth0 172.30.N.12 node2 …
//
// There is no way out: a packet to anywhere else is answered by the control plane's machine as unreachable.
type network struct {
	Number int      `json:"number"`
	Family Families `json:"family"`
}

// mostNetworks is how many clusters fit on a machine.
const mostNetworks = 32

func (n network) link() string { return fmt.Sprintf("mantlet%d", n.Number) }

// nodes are the networks of the nodes themselves, IPv4 first.
func (n network) nodes() []netip.Prefix {
	return n.family(netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 30, byte(n.Number), 0}), 24), netip.PrefixFrom(n.ipv6(0), 64))
}

// pods are the networks of which each node gets a part.
func (n network) pods() []netip.Prefix {
	return n.family(netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(200 + n.Number), 0, 0}), 16), netip.PrefixFrom(n.ipv6(0x100), 56))
}

// services are the ranges of cluster IPs.
func (n network) services() []netip.Prefix {
	return n.family(netip.MustParsePrefix("10.96.0.0/16"), netip.PrefixFrom(n.ipv6(0xff00), 112))
}

func (n network) family(v4, v6 netip.Prefix) []netip.Prefix {
	if n.Family == DualStack {
		return []netip.Prefix{v4, v6}
	}
	return []netip.Prefix{v4}
}

// ipv6 is fd6d:616e:746c:NN:: with the low byte of the third group being the number: of the unique local addresses (RFC 4193).
func (n network) ipv6(subnet uint16) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfd, 0x6d, 0x61, 0x6e, 0x74, byte(n.Number), byte(subnet >> 8), byte(subnet)})
}

// Hosts in the networks of the nodes.
const (
	controlHost = 1
	firstNode   = 11
	outsideHost = 254 // this machine
)

// addresses are those of a host in the networks of the nodes.
func (n network) addresses(host byte) []netip.Addr {
	var out []netip.Addr
	for _, p := range n.nodes() {
		raw := p.Addr().AsSlice()
		raw[len(raw)-1] = host
		address, _ := netip.AddrFromSlice(raw)
		out = append(out, address)
	}
	return out
}

// dns is the cluster IP of the DNS service.
func (n network) dns() netip.Addr {
	raw := n.services()[0].Addr().As4()
	raw[3] = 10
	return netip.AddrFrom4(raw)
}

// claim takes the first network that is free, and connects this machine with the control plane's, in which it makes the bridge. The name of
// the link is the lock: the kernel makes it for one cluster only.
func claim(family Families, control *Machine) (*network, error) {
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list this machine's routes: %w", err)
	}
	for number := range mostNetworks {
		n := &network{Number: number, Family: family}
		if n.overlaps(routes) {
			continue
		}
		link := &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: n.link()},
			PeerName:  "host", PeerNamespace: netlink.NsPid(control.Init.PID),
		}
		err := netlink.LinkAdd(link)
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("make link %s: %w", n.link(), err)
		}
		return n, n.connectHost(control)
	}
	return nil, fmt.Errorf("no network is free for a cluster: this machine has routes to each of 172.30.N.0/24 or 10.(200+N).0.0/16\n" +
		"  hint: see `ip route` and `ip link`; `cluster down` removes a cluster")
}

func (n network) overlaps(routes []netlink.Route) bool {
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		address, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, _ := r.Dst.Mask.Size()
		if !ok || ones == 0 {
			continue
		}
		taken := netip.PrefixFrom(address.Unmap(), ones)
		for _, own := range append(n.nodes(), n.pods()...) {
			if own.Overlaps(taken) {
				return true
			}
		}
	}
	return false
}

// release removes the link to the host, and with it its routes.
func (n network) release() error {
	link, err := netlink.LinkByName(n.link())
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil {
		return fmt.Errorf("remove link %s: %w", n.link(), err)
	}
	return nil
}

// connectHost sets up both ends of the claimed link.
func (n network) connectHost(control *Machine) error {
	return errors.Join(
		control.netlink(func(h *netlink.Handle) error {
			// An address of its own: otherwise the bridge takes the least one of its links, another one with each node, and neighbours keep
			// sending to the one before.
			address := net.HardwareAddr{0x02, 0x6d, 0x61, 0x6e, 0x74, byte(n.Number)}
			bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "cluster", HardwareAddr: address}}
			if err := h.LinkAdd(bridge); err != nil {
				return err
			}
			if err := n.assign(h, "cluster", controlHost); err != nil {
				return err
			}
			if err := attach(h, "host"); err != nil {
				return err
			}
			return up(h, "lo")
		}),
		func() error {
			h, err := netlink.NewHandle()
			if err != nil {
				return err
			}
			defer h.Close()
			if err := n.assign(h, n.link(), outsideHost); err != nil {
				return err
			}
			for i, pods := range n.pods() {
				if err := route(h, pods, n.addresses(controlHost)[i]); err != nil {
					return err
				}
			}
			return nil
		}(),
	)
}

// connectNode gives a node its eth0, on the control plane's bridge.
func (n network) connectNode(control, node *Machine, host byte) error {
	err := control.netlink(func(h *netlink.Handle) error {
		link := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: node.Name}, PeerName: "eth0", PeerNamespace: netlink.NsPid(node.Init.PID)}
		if err := h.LinkAdd(link); err != nil {
			return err
		}
		return attach(h, node.Name)
	})
	if err != nil {
		return err
	}
	return node.netlink(func(h *netlink.Handle) error {
		if err := errors.Join(up(h, "lo"), n.assign(h, "eth0", host)); err != nil {
			return err
		}
		for i, all := range []netip.Prefix{netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)} {
			if i < len(n.nodes()) {
				if err := route(h, all, n.addresses(controlHost)[i]); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// netlink runs f with a socket of the machine's network.
func (m *Machine) netlink(f func(*netlink.Handle) error) error {
	ns, err := netns.GetFromPid(m.Init.PID)
	if err != nil {
		return fmt.Errorf("network of %s: %w", m.Name, err)
	}
	defer ns.Close() //nolint:errcheck // it was only read
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return fmt.Errorf("network of %s: %w", m.Name, err)
	}
	defer h.Close()
	if err := f(h); err != nil {
		return fmt.Errorf("network of %s: %w", m.Name, err)
	}
	return nil
}

// attach connects a link to the bridge.
func attach(h *netlink.Handle, name string) error {
	bridge, err := h.LinkByName("cluster")
	if err != nil {
		return err
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return errors.Join(h.LinkSetMaster(link, bridge), h.LinkSetUp(link))
}

func up(h *netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return h.LinkSetUp(link)
}

// assign gives a link the addresses of a host, and brings it up. That nobody else has them is known, and not asked on the link.
func (n network) assign(h *netlink.Handle, name string, host byte) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for i, address := range n.addresses(host) {
		a := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(address, n.nodes()[i].Bits()))}
		if address.Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(link, a); err != nil {
			return fmt.Errorf("%s: add %s: %w", name, address, err)
		}
	}
	return h.LinkSetUp(link)
}

func route(h *netlink.Handle, to netip.Prefix, via netip.Addr) error {
	if err := h.RouteReplace(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("route %s via %s: %w", to, via, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
