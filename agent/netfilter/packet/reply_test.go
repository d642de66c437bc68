package packet

import (
	"net"
	"net/netip"
	"testing"

	"github.com/mantlet/mantlet/verdict"
)

// What comes from a node port of the own node, which only a forger sends, makes no flow on which the pod could answer past where the service leads: the
// node would balance the answers, to whomever. Other flows of the node have their answers.
func TestNoRepliesToNodePorts(t *testing.T) {
	outside := surroundings(t)
	for _, node := range []netip.Addr{node4, node6} {
		for _, port := range []uint16{30053, 30054, 30055} {
			at := netip.AddrPortFrom(node, port)
			known := port != 30055
			p := here(verdict.Packets{Services: []verdict.PacketService{
				{Protocol: verdict.UDP, Addr: netip.AddrPortFrom(node, 30053)}, {Protocol: verdict.UDP, Addr: netip.AddrPortFrom(node, 30054)},
			}})
			apply(t, *p)
			app, forger := socket(t, nil, netip.AddrPortFrom(same(node, own), 0).String()), socket(t, outside, at.String())
			if send(t, app, net.UDPAddrFromAddrPort(at), "x") == known {
				t.Errorf("%s: passes before: %t", at, known)
			}
			app = socket(t, nil, netip.AddrPortFrom(same(node, own), 0).String())
			send(t, forger, app.LocalAddr(), "forged")
			receive(t, app)
			if send(t, app, net.UDPAddrFromAddrPort(at), "x") == known {
				t.Errorf("%s: an answer passes: %t", at, known)
			}
			if err := Check(kernel(t), p); err != nil {
				t.Error(err)
			}
		}
	}
}
