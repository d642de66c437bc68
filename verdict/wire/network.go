package wire

import (
	"errors"
	"fmt"
	"net/netip"

	"google.golang.org/protobuf/proto"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/verdict"
)

// NetworkMessage returns the message that stands for a Network.
func NetworkMessage(n *verdict.Network) *mantletv1.Network {
	m := new(mantletv1.Network)
	for _, p := range n.Cluster {
		p = p.Masked()
		m.Cluster = append(m.Cluster, &mantletv1.Prefix{Address: p.Addr().AsSlice(), Bits: uint32(p.Bits())})
	}
	for _, a := range n.Node {
		m.Node = append(m.Node, a.AsSlice())
	}
	for _, a := range n.Asked() {
		m.Services = append(m.Services, addressPort(a))
	}
	if r := n.NodePortRange(); r != verdict.DefaultNodePorts {
		m.NodePorts = &mantletv1.PortRange{First: uint32(r.First), Last: uint32(r.Last)}
	}
	return m
}

// UnmarshalNetwork reads the message. A network without cluster prefixes is refused: every destination would count as one outside.
func UnmarshalNetwork(b []byte) (n verdict.Network, err error) {
	m := new(mantletv1.Network)
	if err := proto.Unmarshal(b, m); err != nil {
		return n, fmt.Errorf("network: not the message: %w", err)
	}
	if len(m.Cluster) == 0 {
		return n, errors.New("network: no cluster prefixes")
	}
	for i, p := range m.Cluster {
		addr, err := address(p.GetAddress())
		if err != nil {
			return n, fmt.Errorf("network: cluster[%d]: %w", i, err)
		}
		prefix := netip.PrefixFrom(addr, int(min(p.Bits, 1000)))
		if !prefix.IsValid() || prefix != prefix.Masked() {
			return n, fmt.Errorf("network: cluster[%d]: %s/%d is not a masked prefix", i, addr, p.Bits)
		}
		n.Cluster = append(n.Cluster, prefix)
	}
	for i, b := range m.Node {
		addr, err := address(b)
		if err != nil {
			return n, fmt.Errorf("network: node[%d]: %w", i, err)
		}
		n.Node = append(n.Node, addr)
	}
	for i, s := range m.Services {
		addr, err := address(s.GetAddress())
		if err != nil || s.GetPort() < 1 || s.GetPort() > 65535 {
			return n, fmt.Errorf("network: services[%d]: %x and %d are no address with a port", i, s.GetAddress(), s.GetPort())
		}
		to := netip.AddrPortFrom(addr, uint16(s.GetPort()))
		if i > 0 && n.Services[i-1].Compare(to) >= 0 {
			return n, fmt.Errorf("network: services[%d]: %s is not in order, or twice", i, to)
		}
		n.Services = append(n.Services, to)
	}
	if r := m.NodePorts; r != nil {
		if r.First < 1 || r.First > r.Last || r.Last > 65535 {
			return n, fmt.Errorf("network: node ports %d-%d are no range", r.First, r.Last)
		}
		n.NodePorts = verdict.PortRange{First: uint16(r.First), Last: uint16(r.Last)}
	}
	if !proto.Equal(NetworkMessage(&n), m) {
		return n, errors.New("network: a field that is not known")
	}
	return n, nil
}

func address(b []byte) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(b)
	if !ok || a.Is4In6() {
		return a, fmt.Errorf("%x is no address", b)
	}
	return a, nil
}
