package verdict

import (
	"encoding/json"
	"net/netip"
	"testing"
)

// dns admits 10.64.0.0/16 but one pod of it on 53/UDP, and sends to anyone on 500/SCTP.
func dns() *Packets {
	prefix := netip.MustParsePrefix
	return &Packets{
		Node:    []netip.Addr{netip.MustParseAddr("192.0.2.1")},
		Ingress: []PacketBlock{{UDP, []PortRange{{53, 53}}, []PacketPrefix{{prefix("10.64.0.0/16"), true}, {prefix("10.64.0.9/32"), false}}}},
		Egress:  []PacketBlock{{SCTP, []PortRange{{500, 500}}, []PacketPrefix{{prefix("0.0.0.0/0"), true}, {prefix("::/0"), true}}}},
		Services: []PacketService{
			{Protocol: UDP, Addr: netip.MustParseAddrPort("10.96.0.10:53"), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.64.0.3:53")}},
			{Protocol: SCTP, Addr: netip.MustParseAddrPort("10.96.0.9:500"), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("10.64.0.3:500")}},
		},
	}
}

func TestPacketsService(t *testing.T) {
	p := dns()
	for _, c := range []struct {
		proto Protocol
		to    string
		want  *PacketService
	}{
		{UDP, "10.96.0.10:53", &p.Services[0]},
		{UDP, "[::ffff:10.96.0.10]:53", &p.Services[0]},
		{SCTP, "10.96.0.9:500", &p.Services[1]},
		{UDP, "10.96.0.10:54", nil},
		{SCTP, "10.96.0.10:53", nil},
		{UDP, "10.96.0.9:500", nil},
	} {
		if got := p.Service(c.proto, netip.MustParseAddrPort(c.to)); got != c.want {
			t.Errorf("%s/%s: %+v", c.to, c.proto, got)
		}
	}
}

func TestPacketsAllow(t *testing.T) {
	p := dns()
	for _, c := range []struct {
		proto   Protocol
		port    uint16
		peer    string
		in, out bool
	}{
		{UDP, 53, "10.64.0.3", true, false},
		{UDP, 53, "::ffff:10.64.0.3", true, false},
		{UDP, 53, "10.64.0.9", false, false},
		{UDP, 54, "10.64.0.3", false, false},
		{SCTP, 53, "10.64.0.3", false, false},
		{SCTP, 500, "fd00::1", false, true},
		{UDP, 9, "192.0.2.1", true, true},
	} {
		a := netip.MustParseAddr(c.peer)
		if in, out := p.AllowsIngress(c.proto, c.port, a), p.AllowsEgress(c.proto, c.port, a); in != c.in || out != c.out {
			t.Errorf("%d/%s, %s: ingress %v, egress %v", c.port, c.proto, c.peer, in, out)
		}
	}
	zero := &Packets{}
	if a := netip.MustParseAddr("10.64.0.3"); zero.AllowsIngress(UDP, 53, a) || zero.AllowsEgress(UDP, 53, a) {
		t.Error("packets that say nothing allow")
	}
}

func TestPacketsTravel(t *testing.T) {
	b, err := json.Marshal(dns())
	if err != nil {
		t.Fatal(err)
	}
	var got Packets
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
	if got.Hash() != dns().Hash() {
		t.Errorf("%s came back as another value: %+v", b, got)
	}
	got.Ingress[0].Peers[1].Allow = true
	if got.Hash() == dns().Hash() {
		t.Error("different values hash alike")
	}
}
