package netfilter

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/xds/names"
)

// SetNode says what the addresses of the pod's own node are now. What comes from them is not redirected any more, so that the node sees
// what the app does: a probe of a closed port is refused, as without a sidecar. Until it is called everything is redirected.
//
// Connections that were not redirected, and come from no address of the node now, are forgotten by conntrack: their next packet is redirected,
// and they are reset. On error the table is as it was, or such connections may go on.
func (r *Redirect) SetNode(addrs []netip.Addr) error {
	node := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		node = append(node, a.Unmap())
	}
	slices.SortFunc(node, netip.Addr.Compare)
	node = slices.Compact(node)

	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.cfg.Node
	if r.judged && slices.Equal(node, before) {
		return nil
	}
	r.cfg.Node = node
	if err := r.write(); err != nil {
		r.cfg.Node = before
		return err
	}
	// A table of an agent before this one may have let other addresses pass.
	if r.judged && !slices.ContainsFunc(before, func(a netip.Addr) bool { return !slices.Contains(node, a) }) {
		return nil
	}
	r.judged = false
	n, err := forgetFormerNode(node)
	if n > 0 {
		r.logger.Info("redirect: ended connections that came past it from addresses that are not the node's any more", "connections", n)
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
//   - what comes from a port of the range of node ports. An entry that such a packet begins would let the app's packets to that node port pass
//     as its replies, a SYN too (RFC 9293 3.5, simultaneous open): not redirected, past the egress verdicts on what is behind the node port. Whoever can
//     forge the node's address could begin one for a confined app. Clients have their ports above that range (net.ipv4.ip_local_port_range).
func passOwnNode(a netip.Addr) []expr.Any {
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
		&expr.Range{Op: expr.CmpOpNeq, Register: 1, FromData: port(names.FirstNodePort), ToData: port(names.LastNodePort)},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: port(names.InboundPort)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: port(names.OutboundPort)},
		&expr.Verdict{Kind: expr.VerdictReturn},
	}
}
