package wire

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/verdict"
)

// PacketsMessage returns a packet policy as the message that stands for it. It takes what a compiler made, in order and whole; that is
// checked where it is read.
func PacketsMessage(p *verdict.Packets) *mantletv1.Packets {
	m := new(mantletv1.Packets)
	for _, a := range p.Node {
		m.Node = append(m.Node, a.AsSlice())
	}
	lists := map[string]uint32{} // index into m.Peers, by content
	blocks := func(list []verdict.PacketBlock) (out []*mantletv1.PacketBlock) {
		for i := range list {
			b := &list[i]
			key := peersKey(b.Peers)
			index, known := lists[key]
			if !known {
				index = uint32(len(m.Peers))
				lists[key] = index
				m.Peers = append(m.Peers, packetPeers(b.Peers))
			}
			w := &mantletv1.PacketBlock{Protocol: mantletv1.Protocol(b.Protocol), Peers: index}
			for _, r := range b.Ports {
				w.Ports = append(w.Ports, &mantletv1.PortRange{First: uint32(r.First), Last: uint32(r.Last)})
			}
			out = append(out, w)
		}
		return out
	}
	m.Ingress, m.Egress = blocks(p.Ingress), blocks(p.Egress)
	for i := range p.Services {
		s := &p.Services[i]
		w := &mantletv1.PacketService{Protocol: mantletv1.Protocol(s.Protocol), Address: addressPort(s.Addr)}
		for _, e := range s.Endpoints {
			w.Endpoints = append(w.Endpoints, addressPort(e))
		}
		m.Services = append(m.Services, w)
	}
	return m
}

func peersKey(peers []verdict.PacketPrefix) string {
	var b strings.Builder
	for _, q := range peers {
		b.Write(q.Prefix.Addr().AsSlice())
		b.WriteByte(byte(q.Prefix.Addr().BitLen())) // so that no list runs into the next family's
		b.WriteByte(byte(q.Prefix.Bits()))
		b.WriteByte(map[bool]byte{true: 1}[q.Allow])
	}
	return b.String()
}

func packetPeers(peers []verdict.PacketPrefix) *mantletv1.PacketPeers {
	m := new(mantletv1.PacketPeers)
	for _, q := range peers {
		m.Prefixes = append(m.Prefixes, &mantletv1.PacketPrefix{Address: q.Prefix.Addr().AsSlice(), Bits: uint32(q.Prefix.Bits()), Allow: q.Allow})
	}
	return m
}

func addressPort(a netip.AddrPort) *mantletv1.AddressPort {
	return &mantletv1.AddressPort{Address: a.Addr().AsSlice(), Port: uint32(a.Port())}
}

// UnmarshalPackets reads what [MarshalPackets] wrote. The error names the place and what is wrong there.
func UnmarshalPackets(b []byte) (*verdict.Packets, error) {
	m := new(mantletv1.Packets)
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("packets: not the message: %w", err)
	}
	p, err := readPackets(m)
	if err != nil {
		return nil, fmt.Errorf("packets: %w", err)
	}
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if !proto.Equal(PacketsMessage(p), m) {
		return nil, errors.New("packets: a field that is not known, or lists of peers that are written twice, out of order or for nothing")
	}
	return p, nil
}

// MarshalPackets writes a packet policy as bytes, the same for the same policy.
func MarshalPackets(p *verdict.Packets) ([]byte, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(PacketsMessage(p))
	if err != nil {
		return nil, fmt.Errorf("packets: %w", err)
	}
	return b, nil
}

func readPackets(m *mantletv1.Packets) (*verdict.Packets, error) {
	p := new(verdict.Packets)
	for i, raw := range m.Node {
		a, ok := netip.AddrFromSlice(raw)
		if !ok || i > 0 && p.Node[i-1].Compare(a) >= 0 {
			return nil, fmt.Errorf("node[%d]: %x is no address, out of order, or listed twice", i, raw)
		}
		p.Node = append(p.Node, a)
	}
	lists := make([][]verdict.PacketPrefix, len(m.Peers))
	for i, l := range m.Peers {
		var err error
		if lists[i], err = readPacketPeers(l); err != nil {
			return nil, fmt.Errorf("peers[%d].%w", i, err)
		}
	}
	var err error
	if p.Ingress, err = readPacketBlocks(m.Ingress, lists); err != nil {
		return nil, fmt.Errorf("ingress%w", err)
	}
	if p.Egress, err = readPacketBlocks(m.Egress, lists); err != nil {
		return nil, fmt.Errorf("egress%w", err)
	}
	for i, w := range m.Services {
		var s verdict.PacketService
		if s.Protocol, err = packetProtocol(w.Protocol); err != nil {
			return nil, fmt.Errorf("services[%d]: %w", i, err)
		}
		if s.Addr, err = readAddressPort(w.Address); err != nil {
			return nil, fmt.Errorf("services[%d]: %w", i, err)
		}
		for j, e := range w.Endpoints {
			a, err := readAddressPort(e)
			if err != nil {
				return nil, fmt.Errorf("services[%d]: endpoints[%d]: %w", i, j, err)
			}
			s.Endpoints = append(s.Endpoints, a)
		}
		p.Services = append(p.Services, s)
	}
	return p, nil
}

// packetProtocol is a protocol that is decided by address.
func packetProtocol(p mantletv1.Protocol) (verdict.Protocol, error) {
	switch p {
	case mantletv1.Protocol_PROTOCOL_UDP:
		return verdict.UDP, nil
	case mantletv1.Protocol_PROTOCOL_SCTP:
		return verdict.SCTP, nil
	}
	return 0, fmt.Errorf("protocol %d is not decided by address", p)
}

// readPacketBlocks reads the blocks of one direction. Its errors begin with the index in brackets.
func readPacketBlocks(list []*mantletv1.PacketBlock, peers [][]verdict.PacketPrefix) ([]verdict.PacketBlock, error) {
	out := make([]verdict.PacketBlock, 0, len(list)) // never nil, as the compiler has it: the hash tells one from the other
	for i, m := range list {
		var b verdict.PacketBlock
		var err error
		if b.Protocol, err = packetProtocol(m.Protocol); err != nil {
			return nil, fmt.Errorf("[%d]: %w", i, err)
		}
		if b.Ports, err = portRanges(m.Ports); err != nil {
			return nil, fmt.Errorf("[%d]: %w", i, err)
		}
		if uint64(m.Peers) >= uint64(len(peers)) {
			return nil, fmt.Errorf("[%d]: there is no list %d of peers", i, m.Peers)
		}
		b.Peers = slices.Clone(peers[m.Peers])
		if i > 0 && cmp.Or(cmp.Compare(out[i-1].Protocol, b.Protocol), cmp.Compare(out[i-1].Ports[0].First, b.Ports[0].First)) >= 0 {
			return nil, fmt.Errorf("[%d]: %s %s is out of order", i, b.Protocol, b.Ports[0])
		}
		out = append(out, b)
	}
	return out, nil
}

func readPacketPeers(m *mantletv1.PacketPeers) ([]verdict.PacketPrefix, error) {
	var out []verdict.PacketPrefix
	for i, w := range m.Prefixes {
		p, err := readPrefix(w.Address, w.Bits)
		if err != nil {
			return nil, fmt.Errorf("prefixes[%d]: %w", i, err)
		}
		out = append(out, verdict.PacketPrefix{Prefix: p, Allow: w.Allow})
	}
	return out, nil
}

func readAddressPort(m *mantletv1.AddressPort) (netip.AddrPort, error) {
	a, ok := netip.AddrFromSlice(m.GetAddress())
	if !ok || m.GetPort() > 65535 {
		return netip.AddrPort{}, fmt.Errorf("%x with port %d is no address with a port", m.GetAddress(), m.GetPort())
	}
	return netip.AddrPortFrom(a, uint16(m.GetPort())), nil
}
