package packet

import (
	"net/netip"
	"slices"

	"github.com/mantlet/mantlet/verdict"
)

// Widens reports whether a policy lets through all that another did, so that conntrack has nothing to forget where it takes the place of
// that. It may say no where it is so; it never says yes where it is not.
func Widens(before, next *verdict.Packets) bool {
	return slices.Equal(before.Node, next.Node) && !Releads(before, next) && covered(before.Ingress, next.Ingress) && covered(before.Egress, next.Egress)
}

// Releads reports whether flows of services may have to go elsewhere where a policy takes the place of another: to another endpoint, or, where
// there was no service or is none any more, to one or to none. A service that has endpoints, and had none, may have had some before that: its flows then
// are remembered (see Revoke), led to what is no endpoint any more.
func Releads(before, next *verdict.Packets) bool {
	for i := range before.Services {
		was := &before.Services[i]
		is := next.Service(was.Protocol, was.Addr)
		if is == nil || slices.ContainsFunc(was.Endpoints, func(e netip.AddrPort) bool {
			_, found := slices.BinarySearchFunc(is.Endpoints, e, netip.AddrPort.Compare)
			return !found
		}) {
			return true
		}
	}
	for i := range next.Services {
		is := &next.Services[i]
		switch was := before.Service(is.Protocol, is.Addr); {
		case was == nil && before.AllowsEgress(is.Protocol, is.Addr.Port(), is.Addr.Addr()):
			return true
		case (was == nil || len(was.Endpoints) == 0) && len(is.Endpoints) > 0:
			return true
		}
	}
	return false
}

// Misleads reports whether a policy that takes the place of another finds flows of services under way that are to go elsewhere: to another endpoint
// than theirs, or past one to what is no endpoint any more and may be reached. Of the others that Releads speaks of none gets through.
func Misleads(before, next *verdict.Packets) bool {
	for i := range before.Services {
		was := &before.Services[i]
		var endpoints []netip.AddrPort
		if is := next.Service(was.Protocol, was.Addr); is != nil {
			endpoints = is.Endpoints
		}
		for _, e := range was.Endpoints {
			if _, found := slices.BinarySearchFunc(endpoints, e, netip.AddrPort.Compare); !found &&
				(len(endpoints) > 0 || next.AllowsEgress(was.Protocol, e.Port(), e.Addr())) {
				return true
			}
		}
	}
	for i := range next.Services {
		is := &next.Services[i]
		if before.Service(is.Protocol, is.Addr) == nil && before.AllowsEgress(is.Protocol, is.Addr.Port(), is.Addr.Addr()) {
			return true
		}
	}
	return false
}

// covered reports whether blocks admit, port by port, all that others do.
func covered(before, next []verdict.PacketBlock) bool {
	for i := range before {
		b := &before[i]
		v4, v6 := flatten(b.Peers)
		if len(v4)+len(v6) == 0 {
			continue
		}
		for _, ports := range b.Ports {
			for port := uint32(ports.First); port <= uint32(ports.Last); { // range by range of next
				n, last := blockAt(next, b.Protocol, uint16(port))
				if n == nil {
					return false
				}
				w4, w6 := flatten(n.Peers)
				if !within(v4, w4) || !within(v6, w6) {
					return false
				}
				port = uint32(last) + 1
			}
		}
	}
	return true
}

// blockAt is the block that decides on a port, and the last port of its range there; nil: none.
func blockAt(blocks []verdict.PacketBlock, proto verdict.Protocol, port uint16) (*verdict.PacketBlock, uint16) {
	for i := range blocks {
		for _, r := range blocks[i].Ports {
			if blocks[i].Protocol == proto && r.First <= port && port <= r.Last {
				return &blocks[i], r.Last
			}
		}
	}
	return nil, 0
}

// within reports whether sorted intervals lie in others, which do not touch each other.
func within(inner, outer []interval) bool {
	at := 0
	for _, i := range inner {
		for at < len(outer) && outer[at].last.Less(i.first) {
			at++
		}
		if at == len(outer) || i.first.Less(outer[at].first) || outer[at].last.Less(i.last) {
			return false
		}
	}
	return true
}
