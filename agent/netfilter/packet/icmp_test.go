package packet

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/icmp"
	ip4 "golang.org/x/net/ipv4"
	ip6 "golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/verdict"
)

// What a router says of the path's MTU is heeded, whatever policy says of UDP to the peer and of the router.
func TestPathMTUIsHeeded(t *testing.T) {
	outside := surroundings(t)
	const port, mtu = 9059, 1300 // above the least of IPv6, 1280
	apply(t, verdict.Packets{Egress: []verdict.PacketBlock{udp(port, port, "10.99.0.3/32", "fd99::3/128")}})
	for _, peer := range []netip.Addr{peers[0], peers[4]} {
		local, there := same(peer, own), socket(t, outside, netip.AddrPortFrom(peer, port).String())
		c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(local, 0)), net.UDPAddrFromAddrPort(netip.AddrPortFrom(peer, port)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if before := pathMTU(t, c, peer); before <= mtu {
			t.Fatalf("%s: path MTU %d", peer, before)
		}
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		receive(t, there)
		outside.Do(func() {
			tooBig(t, same(peer, []netip.Addr{peers[1], peers[5]}), local, quoted(peer, local, portOf(c)), mtu)
		})
		deadline := time.Now().Add(10 * time.Second)
		for pathMTU(t, c, peer) != mtu {
			if time.Now().After(deadline) {
				t.Fatalf("%s: path MTU %d, want %d", peer, pathMTU(t, c, peer), mtu)
			}
			time.Sleep(time.Millisecond) //nolint:forbidigo // the kernel notes it without an event to us
		}
	}
}

// quoted is the beginning of a datagram to a peer's port 9059, as an error about it holds it.
func quoted(peer, local netip.Addr, from uint16) []byte {
	header := make([]byte, 8)
	binary.BigEndian.PutUint16(header, from)
	binary.BigEndian.PutUint16(header[2:], 9059)
	binary.BigEndian.PutUint16(header[4:], 1408)
	if peer.Is4() {
		h := ip4.Header{Version: 4, Len: 20, TotalLen: 1428, Flags: ip4.DontFragment, TTL: 60, Protocol: unix.IPPROTO_UDP, Src: local.AsSlice(), Dst: peer.AsSlice()}
		b, _ := h.Marshal()
		return append(b, header...)
	}
	b := make([]byte, 40)
	b[0], b[6], b[7] = 0x60, unix.IPPROTO_UDP, 60
	binary.BigEndian.PutUint16(b[4:], 1408)
	copy(b[8:], local.AsSlice())
	copy(b[24:], peer.AsSlice())
	return append(b, header...)
}

// tooBig says that a packet was too big for a link: fragmentation needed (RFC 1191), or packet too big (RFC 8201).
func tooBig(t *testing.T, router, to netip.Addr, quoted []byte, mtu int) {
	t.Helper()
	network, m, pseudo := "ip4:icmp", icmp.Message{Type: ip4.ICMPTypeDestinationUnreachable, Code: 4, Body: &icmp.DstUnreach{Data: quoted}}, []byte(nil)
	if to.Is6() {
		network, m = "ip6:ipv6-icmp", icmp.Message{Type: ip6.ICMPTypePacketTooBig, Body: &icmp.PacketTooBig{MTU: mtu, Data: quoted}}
		pseudo = icmp.IPv6PseudoHeader(router.AsSlice(), to.AsSlice())
	}
	b, err := m.Marshal(pseudo)
	if err != nil {
		t.Error(err)
		return
	}
	if to.Is4() { // the library leaves out the field of RFC 1191, section 4
		binary.BigEndian.PutUint16(b[6:], uint16(mtu))
		binary.BigEndian.PutUint16(b[2:], 0)
		binary.BigEndian.PutUint16(b[2:], internetChecksum(b))
	}
	c, err := net.ListenPacket(network, router.String())
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	if _, err := c.WriteTo(b, &net.IPAddr{IP: to.AsSlice()}); err != nil {
		t.Error(err)
	}
}

// internetChecksum is that of RFC 1071.
func internetChecksum(b []byte) uint16 {
	sum := uint32(0)
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func pathMTU(t *testing.T, c *net.UDPConn, peer netip.Addr) (mtu int) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	level, option := unix.IPPROTO_IP, unix.IP_MTU
	if peer.Is6() {
		level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
	}
	if failed := raw.Control(func(fd uintptr) { mtu, err = unix.GetsockoptInt(int(fd), level, option) }); failed != nil || err != nil {
		t.Fatal(failed, err)
	}
	return mtu
}

// A pod that is closed, and has forgotten where its neighbours are, finds them again.
func TestNeighboursAreFoundAgain(t *testing.T) {
	outside := surroundings(t)
	apply(t, verdict.Packets{})
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range []netip.Addr{node4, node6} {
		there, c := socket(t, outside, netip.AddrPortFrom(node, 0).String()), socket(t, nil, netip.AddrPortFrom(same(node, own), 0).String())
		for i := range 3 {
			forgot := false
			known, err := netlink.NeighList(link.Attrs().Index, unix.AF_UNSPEC)
			if err != nil {
				t.Fatal(err)
			}
			for j := range known {
				if known[j].IP.Equal(node.AsSlice()) {
					forgot = true
					if err := netlink.NeighDel(&known[j]); err != nil {
						t.Fatal(err)
					}
				}
			}
			if i > 0 && !forgot {
				t.Errorf("%s is no neighbour", node)
			}
			send(t, c, there.LocalAddr(), "x")
			if word, _ := receive(t, there); word != "x" {
				t.Errorf("%s: got %q", node, word)
			}
		}
	}
}
