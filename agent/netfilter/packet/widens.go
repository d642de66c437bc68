package packet

import (
	"slices"

	"github.com/mantlet/mantlet/verdict"
)

// Widens reports whether a policy lets through all that another did, so that no flow has to be forgotten where it takes the place of
// that. It may say no where it is so; it never says yes where it is not.
func Widens(before, next *verdict.Packets) bool {
	return slices.Equal(before.Node, next.Node) &&
		slices.EqualFunc(before.Services, next.Services, func(a, b verdict.PacketService) bool {
			return a.Compare(&b) == 0 && slices.Equal(a.Endpoints, b.Endpoints)
		}) &&
		covered(before.Ingress, next.Ingress) && covered(before.Egress, next.Egress)
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
