package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// void is the node's way to all that does not exist. The service table rejects what goes there; the way has to be there all the same,
	// or the node's own connections to a Service's address would fail before that address is translated.
	void, voidPeer = "void0", "void1"
	// linkGroup marks the node's ends of all links, to remove them in one go.
	linkGroup = 0x6d61
	// inner is the name of a pod's end.
	inner = "eth0"
)

var (
	// The same pair of hardware addresses on every link: each is a network of two.
	nodeMAC  = net.HardwareAddr{0x02, 0x6d, 0, 0, 0, 1}
	innerMAC = net.HardwareAddr{0x02, 0x6d, 0, 0, 0, 2}
	// What the node is called on every link, and the outside on its own.
	gateway4, gateway6 = net.IPv4(169, 254, 1, 1), net.ParseIP("fe80::1")
	outside4, outside6 = net.IPv4(169, 254, 1, 2), net.ParseIP("fe80::2")
)

func linkNode(node4, node6 netip.Addr) error {
	lo, err := loopback()
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{node4, node6} {
		if err := addAddress(lo, a); err != nil {
			return err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = void
	pair := netlink.NewVeth(attrs) // not a dummy interface, which some kernels lack; veth is needed anyway
	pair.PeerName = voidPeer
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("add interface %s: %w", void, err)
	}
	if _, err := up(voidPeer); err != nil {
		return err
	}
	link, err := up(void)
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{node4, node6} {
		r := netlink.Route{LinkIndex: link.Attrs().Index, Dst: everything(a), Src: a.AsSlice(), Scope: netlink.SCOPE_LINK,
			Priority: 1 << 16} // after that to an outside, should its CIDR be /0
		if err := netlink.RouteReplace(&r); err != nil {
			return fmt.Errorf("add the default route to %s: %w", void, err)
		}
	}
	return nil
}

func unlinkNode(node4, node6 netip.Addr) error {
	var errs []error
	if link, err := netlink.LinkByName(void); err == nil {
		errs = append(errs, netlink.LinkDel(link))
	}
	lo, err := loopback()
	errs = append(errs, err)
	for _, a := range []netip.Addr{node4, node6} {
		if err == nil {
			gone := netlink.AddrDel(lo, &netlink.Addr{IPNet: single(a)})
			if !errors.Is(gone, unix.EADDRNOTAVAIL) {
				errs = append(errs, gone)
			}
		}
	}
	return errors.Join(errs...)
}

// loopback brings the current namespace's lo up.
func loopback() (netlink.Link, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find interface lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return nil, fmt.Errorf("bring up lo: %w", err)
	}
	return lo, nil
}

// addLink makes the veth pair between the node, where the caller is, and another namespace.
func addLink(name string, to *os.File) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.Group = name, nodeMAC, linkGroup
	pair := netlink.NewVeth(attrs)
	pair.PeerName, pair.PeerHardwareAddr, pair.PeerNamespace = inner, innerMAC, netlink.NsFd(int(to.Fd()))
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("add link %s to %s: %w", name, to.Name(), err)
	}
	return nil
}

// linkInner sets the far end of a link up: addresses, and the node as the way to everywhere. The caller is in that namespace.
func linkInner(addrs []netip.Addr) error {
	if _, err := loopback(); err != nil {
		return err
	}
	link, err := up(inner)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if err := addAddress(link, a); err != nil {
			return err
		}
	}
	index := link.Attrs().Index
	for _, gw := range []net.IP{gateway4, gateway6} {
		if err := addNeighbour(index, gw, nodeMAC); err != nil {
			return err
		}
		r := netlink.Route{LinkIndex: index, Gw: gw, Flags: int(netlink.FLAG_ONLINK), Dst: everything(addrOf(gw))}
		if err := netlink.RouteReplace(&r); err != nil {
			return fmt.Errorf("add the default route by %s: %w", gw, err)
		}
	}
	return nil
}

// linkPod sets the node's end up: a route to each address of the pod.
func linkPod(name string, addrs []netip.Addr, node4, node6 netip.Addr) error {
	link, err := up(name)
	if err != nil {
		return err
	}
	index := link.Attrs().Index
	for _, a := range addrs {
		if err := addNeighbour(index, a.AsSlice(), innerMAC); err != nil {
			return err
		}
		r := netlink.Route{LinkIndex: index, Dst: single(a), Scope: netlink.SCOPE_LINK, Src: source(a, node4, node6)}
		if a.Is6() {
			r.Scope = netlink.SCOPE_UNIVERSE
		}
		if err := netlink.RouteReplace(&r); err != nil {
			return fmt.Errorf("add a route to %s: %w", a, err)
		}
	}
	return nil
}

// linkOutside sets the node's end of the outside's link up: a route to the CIDR by one next hop.
func linkOutside(name string, prefix netip.Prefix, node4, node6 netip.Addr) error {
	link, err := up(name)
	if err != nil {
		return err
	}
	gw := outside4
	if prefix.Addr().Is6() {
		gw = outside6
	}
	if err := addNeighbour(link.Attrs().Index, gw, innerMAC); err != nil {
		return err
	}
	r := netlink.Route{LinkIndex: link.Attrs().Index, Dst: network(prefix), Gw: gw, Flags: int(netlink.FLAG_ONLINK),
		Src: source(prefix.Addr(), node4, node6)}
	if err := netlink.RouteReplace(&r); err != nil {
		return fmt.Errorf("add a route to %s: %w", prefix, err)
	}
	return nil
}

// answerFor makes a namespace accept what arrives for any address of a CIDR, by a local route to all of it. What the namespace itself sends
// goes by the main table instead, to the node: the CIDR may contain the pods' addresses, as 0.0.0.0/0 does.
func answerFor(prefix netip.Prefix) error {
	lo, err := loopback()
	if err != nil {
		return err
	}
	// In this very table, because it is the one in which the kernel looks whether a source address is the host's own.
	r := netlink.Route{LinkIndex: lo.Attrs().Index, Dst: network(prefix), Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: unix.RT_TABLE_LOCAL}
	if err := netlink.RouteReplace(&r); err != nil {
		return fmt.Errorf("accept packets for %s: %w", prefix, err)
	}
	family := unix.AF_INET
	if prefix.Addr().Is6() {
		family = unix.AF_INET6
	}
	rule := func(priority, table int, from string) *netlink.Rule {
		r := netlink.NewRule()
		r.Family, r.Priority, r.Table, r.IifName = family, priority, table, from
		return r
	}
	if err := errors.Join(
		netlink.RuleAdd(rule(10, unix.RT_TABLE_MAIN, lo.Attrs().Name)), // "from lo" is what the host sends
		netlink.RuleAdd(rule(20, unix.RT_TABLE_LOCAL, "")),
		netlink.RuleDel(rule(0, unix.RT_TABLE_LOCAL, "")),
	); err != nil {
		return fmt.Errorf("route by origin for %s: %w", prefix, err)
	}
	return nil
}

// awaitCarrier waits until an end of a link sends packets, which the kernel settles, for each end apart, a moment after the second one is
// up. A packet sent before is lost, and a SYN comes again only after a second.
func awaitCarrier(ctx context.Context, name string, log *slog.Logger) error {
	for waited := 0; ; waited++ {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("look at interface %s: %w", name, err)
		}
		if link.Attrs().OperState == netlink.OperUp {
			if waited > 0 {
				log.Debug("waited for a link", "link", name, "polls", waited)
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for interface %s to carry packets: %w", name, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

func removeLink(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	return netlink.LinkDel(link)
}

// removeLinks removes the node's ends of all links, and with them the far ends, in one step; one by one each would wait for the kernel's
// grace period.
func removeLinks() error {
	r := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	r.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	r.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(linkGroup)))
	_, err := r.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil && !errors.Is(err, unix.ENODEV) { // ENODEV: there is none
		return fmt.Errorf("remove the pods' links: %w", err)
	}
	return nil
}

func up(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find interface %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring up %s: %w", name, err)
	}
	return link, nil
}

func addAddress(link netlink.Link, a netip.Addr) error {
	address := netlink.Addr{IPNet: single(a)}
	if a.Is6() {
		address.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrAdd(link, &address); err != nil {
		return fmt.Errorf("add address %s to %s: %w", a, link.Attrs().Name, err)
	}
	return nil
}

func addNeighbour(index int, ip net.IP, mac net.HardwareAddr) error {
	n := netlink.Neigh{LinkIndex: index, IP: ip, HardwareAddr: mac, State: netlink.NUD_PERMANENT, Family: unix.AF_INET}
	if ip.To4() == nil {
		n.Family = unix.AF_INET6
	}
	if err := netlink.NeighSet(&n); err != nil {
		return fmt.Errorf("add neighbour %s: %w", ip, err)
	}
	return nil
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func single(a netip.Addr) *net.IPNet { return network(netip.PrefixFrom(a, a.BitLen())) }

func everything(a netip.Addr) *net.IPNet { return network(netip.PrefixFrom(a, 0).Masked()) }

func network(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func source(a, node4, node6 netip.Addr) net.IP {
	if a.Is4() {
		return node4.AsSlice()
	}
	return node6.AsSlice()
}
