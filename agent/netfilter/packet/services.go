package packet

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/verdict"
)

// family is where IPv4 and IPv6 differ.
type family struct {
	suffix      string
	number      byte
	kind        nftables.SetDatatype
	destination uint32 // offset in the IP header
	words       uint32 // of an address, in registers of four bytes
}

var (
	ipv4 = family{"-v4", unix.NFPROTO_IPV4, nftables.TypeIPAddr, 16, 1}
	ipv6 = family{"-v6", unix.NFPROTO_IPV6, nftables.TypeIP6Addr, 24, 4}
)

// register is the nth register of four bytes, as the kernel calls it when rules are read back.
func register(n uint32) uint32 {
	if n%4 == 0 {
		return unix.NFT_REG_1 + n/4
	}
	return unix.NFT_REG32_00 + n
}

// services adds, in nft's own language:
//
//	chain services { type nat hook output priority -100; policy accept;
//		meta mark 0x6d74 accept
//		meta l4proto . ip daddr . th dport vmap @services-v4     # udp . 10.96.0.10 . 53 : goto service-3ab2…, …
//		meta l4proto . ip6 daddr . th dport vmap @services-v6
//	}
//	chain service-3ab2… {
//		dnat ip to numgen random mod 2 map @service-3ab2…        # 0 : 10.64.0.3 . 53, 1 : 10.64.0.7 . 53
//	}
//	chain service-70c1… {                                            # no endpoints
//		drop
//	}
//
// Those with the same endpoints share a chain, whose name stands for them: a node port is at every node's addresses.
//
// NAT asks once for each flow; what comes back is translated back. The proxy's mark leaves the agent's own flows to the node.
func (e *emission) services(list []verdict.PacketService, mark uint32) {
	rs := e.rules
	accept := nftables.ChainPolicyAccept
	base := Chain{Chain: &nftables.Chain{Name: "services", Table: rs.Table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput,
		Priority: nftables.ChainPriorityNATDest, Policy: &accept}}
	base.Rules = append(base.Rules, rule(meta(expr.MetaKeyMARK, binaryutil.NativeEndian.PutUint32(mark)), done(expr.VerdictAccept)))
	for _, f := range []family{ipv4, ipv6} {
		all := Set{Set: &nftables.Set{Table: rs.Table, Name: "services" + f.suffix, IsMap: true, DataType: nftables.TypeVerdict,
			KeyType: nftables.MustConcatSetType(nftables.TypeInetProto, f.kind, nftables.TypeInetService)}}
		for i := range list {
			s := &list[i]
			if s.Addr.Addr().Is4() != (f.number == unix.NFPROTO_IPV4) {
				continue
			}
			content, made := e.named(fmt.Sprint("service", f.suffix, s.Endpoints))
			name := "service-" + content
			if !made {
				e.led = append(e.led, rs.service(f, name, s))
			}
			key := slices.Concat([]byte{protocolNumber(s.Protocol), 0, 0, 0}, s.Addr.Addr().AsSlice(), portWord(s.Addr.Port()))
			all.Elements = append(all.Elements, nftables.SetElement{Key: key, VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: name}})
		}
		rs.add(&all)
		base.Rules = append(base.Rules, rule(nfproto(f.number == unix.NFPROTO_IPV4), []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register(0)},
			&expr.Payload{DestRegister: register(1), Base: expr.PayloadBaseNetworkHeader, Offset: f.destination, Len: 4 * f.words},
			&expr.Payload{DestRegister: register(1 + f.words), Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		}, lookup(all.Set)))
	}
	rs.Chains = append(rs.Chains, base)
}

// service makes the chain that leads a flow to one of the endpoints, or refuses it where there is none.
func (rs *Ruleset) service(f family, name string, s *verdict.PacketService) Chain {
	c := rs.chain(name)
	if len(s.Endpoints) == 0 {
		c.Rules = append(c.Rules, rule(done(expr.VerdictDrop)))
		return c
	}
	endpoints := Set{Set: &nftables.Set{Table: rs.Table, Name: name, IsMap: true, KeyType: nftables.TypeInteger,
		DataType: nftables.MustConcatSetType(f.kind, nftables.TypeInetService)}}
	for i, e := range s.Endpoints {
		endpoints.Elements = append(endpoints.Elements, nftables.SetElement{
			Key: binaryutil.NativeEndian.PutUint32(uint32(i)), // numgen counts in the machine's own order
			Val: append(e.Addr().AsSlice(), portWord(e.Port())...)})
	}
	rs.add(&endpoints)
	addr, port := register(0), register(f.words)
	c.Rules = append(c.Rules, []expr.Any{
		&expr.Numgen{Register: register(0), Modulus: uint32(len(s.Endpoints)), Type: unix.NFT_NG_RANDOM},
		&expr.Lookup{SourceRegister: register(0), DestRegister: register(0), IsDestRegSet: true, SetName: endpoints.Name, SetID: endpoints.ID},
		// The kernel reads one address and one port back as ranges of one: written so, what is read equals what was written.
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.number), RegAddrMin: addr, RegAddrMax: addr, RegProtoMin: port, RegProtoMax: port, Specified: true},
	})
	return c
}

// portWord is a port as part of a concatenated key or value: filled up to four bytes.
func portWord(port uint16) []byte { return append(binary.BigEndian.AppendUint16(nil, port), 0, 0) }

func protocolNumber(p verdict.Protocol) byte {
	if p == verdict.SCTP {
		return unix.IPPROTO_SCTP
	}
	return unix.IPPROTO_UDP
}
