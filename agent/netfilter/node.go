package netfilter

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// SetNode says what the addresses of the pod's own node are now. What comes from them is not redirected any more, so that the node sees
// what the app does: a probe of a closed port is refused, as without a sidecar. Until it is called everything is redirected.
//
// Of a network only that counts, with the services and host ports at the node's own addresses, and the range of node ports; see passOwnNode.
//
// Connections that were not redirected, and come from no address of the node now, are forgotten by conntrack: their next packet is redirected,
// and they are reset. On error the table is as it was, or such connections may go on.
func (r *Redirect) SetNode(n *verdict.Network) error {
	node := make([]netip.Addr, 0, len(n.Node))
	for _, a := range n.Node {
		node = append(node, a.Unmap())
	}
	slices.SortFunc(node, netip.Addr.Compare)
	node = slices.Compact(node)
	var services []netip.AddrPort
	for _, s := range n.Services {
		if slices.Contains(node, s.Addr()) {
			services = append(services, s)
		}
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	was, before := r.cfg, r.cfg.Node
	r.cfg.Node, r.cfg.Services, r.cfg.NodePorts = node, services, n.NodePortRange()
	if r.judged && slices.Equal(node, before) && slices.Equal(services, was.Services) && r.cfg.NodePorts == was.NodePorts {
		return nil
	}
	if err := r.write(); err != nil {
		r.cfg = was
		return err
	}
	// A table of an agent before this one may have let other addresses pass.
	if r.judged && !slices.ContainsFunc(before, func(a netip.Addr) bool { return !slices.Contains(node, a) }) {
		return nil
	}
	r.judged = false
	forgotten, err := forgetFormerNode(node)
	if forgotten > 0 {
		r.logger.Info("redirect: ended connections that came past it from addresses that are not the node's any more", "connections", forgotten)
	}
	if err != nil {
		return fmt.Errorf("redirect: forget connections from former addresses of the node: %w", err)
	}
	r.judged = true
	return nil
}

// passOwnNode leaves TCP from an address of the own node as it is, but for
//
//   - the capture ports, which nobody reaches but by redirect;
//   - what comes from a port of the range of node ports, of a service that has the node's address for an external one, or from a host port. An entry that such a packet
//     begins would let the app's packets to that port pass as its replies, a SYN too (RFC 9293 3.5, simultaneous open): not redirected, past the egress
//     verdicts on what is behind the port. Whoever can forge the node's address could begin one for a confined app. Clients have their ports above the
//     range of node ports (net.ipv4.ip_local_port_range).
func (c Config) passOwnNode(a netip.Addr) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), uint32(12)
	if a.Is6() {
		family, offset = unix.NFPROTO_IPV6, 8
	}
	port := binaryutil.BigEndian.PutUint16
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(a.BitLen() / 8)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
		&expr.Range{Op: expr.CmpOpNeq, Register: 1, FromData: port(c.NodePorts.First), ToData: port(c.NodePorts.Last)},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: port(names.InboundPort)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: port(names.OutboundPort)},
		&expr.Verdict{Kind: expr.VerdictReturn},
	}
}

// balanced matches TCP that says it comes from a service at an address of the own node.
func balanced(s netip.AddrPort) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), uint32(12)
	if s.Addr().Is6() {
		family, offset = unix.NFPROTO_IPV6, 8
	}
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(s.Addr().BitLen() / 8)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: s.Addr().AsSlice()},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(s.Port())},
	}
}
