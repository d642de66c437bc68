package hold

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// maxSYN bounds a SYN: headers, options, and what TCP Fast Open puts into it.
const maxSYN = 1600

// syn is a SYN as it goes on the wire, from the IP header on.
type syn struct {
	packet []byte
	source netip.AddrPort
	dest   netip.AddrPort
}

var errNoSYN = errors.New("not a SYN as a host sends it")

// parse reads a logged packet and completes its TCP checksum: the kernel leaves that to the network device, which a logged packet has
// not seen yet. It copies.
func parse(logged []byte) (syn, error) {
	if len(logged) < 20 || len(logged) > maxSYN {
		return syn{}, errNoSYN
	}
	p := slices.Clone(logged)
	var addresses, tcp []byte
	var src, dst netip.Addr
	switch p[0] >> 4 {
	case 4:
		header := int(p[0]&15) * 4
		if header < 20 || len(p) < header || int(binary.BigEndian.Uint16(p[2:])) != len(p) || p[9] != unix.IPPROTO_TCP ||
			binary.BigEndian.Uint16(p[6:])&0x3fff != 0 { // a fragment
			return syn{}, errNoSYN
		}
		addresses, tcp = p[12:20], p[header:]
		src, dst = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	case 6:
		if len(p) < 40 || int(binary.BigEndian.Uint16(p[4:]))+40 != len(p) || p[6] != unix.IPPROTO_TCP {
			return syn{}, errNoSYN // with extension headers no application's socket sends one
		}
		addresses, tcp = p[8:40], p[40:]
		src, dst = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40]))
	default:
		return syn{}, errNoSYN
	}
	if len(tcp) < 20 || tcp[13]&(flagSYN|flagACK) != flagSYN {
		return syn{}, errNoSYN
	}
	binary.BigEndian.PutUint16(tcp[16:], 0)
	binary.BigEndian.PutUint16(tcp[16:], checksum(addresses, tcp))
	return syn{p, netip.AddrPortFrom(src, binary.BigEndian.Uint16(tcp)), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(tcp[2:]))}, nil
}

// checksum is TCP's: the complement of the one's complement sum over pseudo header and segment (RFC 9293, 3.1).
func checksum(addresses, tcp []byte) uint16 {
	sum := uint32(unix.IPPROTO_TCP) + uint32(len(tcp))
	for _, b := range [][]byte{addresses, tcp} {
		for ; len(b) > 1; b = b[2:] {
			sum += uint32(binary.BigEndian.Uint16(b))
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}
