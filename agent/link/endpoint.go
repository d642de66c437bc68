package link

import (
	"fmt"
	"net/netip"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
)

// Endpoint is the message for an address and a port.
func Endpoint(a netip.AddrPort) *mantletv1.NodeEndpoint {
	return &mantletv1.NodeEndpoint{Address: a.Addr().AsSlice(), Port: uint32(a.Port())}
}

// Endpoints are the messages for addresses and ports.
func Endpoints(list []netip.AddrPort) []*mantletv1.NodeEndpoint {
	out := make([]*mantletv1.NodeEndpoint, len(list))
	for i, a := range list {
		out[i] = Endpoint(a)
	}
	return out
}

// AddrPort reads an Endpoint.
func AddrPort(e *mantletv1.NodeEndpoint) (netip.AddrPort, error) {
	addr, ok := netip.AddrFromSlice(e.GetAddress())
	if !ok || addr.Is4In6() {
		return netip.AddrPort{}, fmt.Errorf("link: %x is no address", e.GetAddress())
	}
	if e.GetPort() > 65535 {
		return netip.AddrPort{}, fmt.Errorf("link: %d is no port", e.GetPort())
	}
	return netip.AddrPortFrom(addr, uint16(e.GetPort())), nil
}

// AddrPorts reads Endpoints.
func AddrPorts(list []*mantletv1.NodeEndpoint) ([]netip.AddrPort, error) {
	out := make([]netip.AddrPort, len(list))
	for i, e := range list {
		var err error
		if out[i], err = AddrPort(e); err != nil {
			return nil, err
		}
	}
	return out, nil
}
