package packet

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/verdict"
)

// Datagrams that come or go in several packets are judged whole, replies too: a packet that is not the first has no ports.
func TestFragments(t *testing.T) {
	outside := surroundings(t)
	const port = 9061
	block := udp(port, port, "10.99.0.3/32", "fd99::3/128")
	apply(t, verdict.Packets{Ingress: []verdict.PacketBlock{block}, Egress: []verdict.PacketBlock{block}})
	large := func(word string) string { return strings.Repeat(word[:1], 8000) + word }
	at := socket(t, nil, net.JoinHostPort("::", "9061"))
	for _, a := range []netip.Addr{peers[0], peers[4]} {
		denied := peers[1]
		if a.Is6() {
			denied = peers[5]
		}
		client, refused := socket(t, outside, netip.AddrPortFrom(a, 0).String()), socket(t, outside, netip.AddrPortFrom(denied, 0).String())
		for _, c := range []net.PacketConn{refused, client} {
			send(t, c, to(same(a, own), port), large("in "+c.LocalAddr().String()))
		}
		word, from := receive(t, at)
		if word != large("in "+client.LocalAddr().String()) {
			t.Fatalf("from %s: %d octets: %.40s", a, len(word), word[max(0, len(word)-40):])
		}
		if !send(t, at, from, large("reply")) {
			t.Errorf("to %s: the reply is dropped", from)
		}
		if word, _ := receive(t, client); word != large("reply") {
			t.Errorf("to %s: %d octets", a, len(word))
		}
		if send(t, at, refused.LocalAddr(), large("no reply")) {
			t.Errorf("to %s: passes", denied)
		}
		server := socket(t, outside, netip.AddrPortFrom(a, port).String())
		if !send(t, at, server.LocalAddr(), large("out")) {
			t.Errorf("to %s: dropped", a)
		}
		if word, _ := receive(t, server); word != large("out") {
			t.Errorf("to %s: %d octets", a, len(word))
		}
	}
}
