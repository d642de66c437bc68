package wire

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/verdict"
)

// fullPackets uses everything that a packet policy can say.
func fullPackets() *verdict.Packets {
	addr, addrPort, prefix := netip.MustParseAddr, netip.MustParseAddrPort, netip.MustParsePrefix
	peers := []verdict.PacketPrefix{{Prefix: prefix("10.0.0.0/8"), Allow: true}, {Prefix: prefix("10.64.0.9/32")}, {Prefix: prefix("fd00::/8"), Allow: true}}
	return &verdict.Packets{
		Node: []netip.Addr{addr("192.0.2.1"), addr("2001:db8::1")},
		Ingress: []verdict.PacketBlock{
			{Protocol: verdict.UDP, Ports: []verdict.PortRange{{First: 53, Last: 53}, {First: 60, Last: 65535}}, Peers: peers},
			{Protocol: verdict.UDP, Ports: []verdict.PortRange{{First: 55, Last: 58}}, Peers: peers[:1]},
			{Protocol: verdict.SCTP, Ports: []verdict.PortRange{{First: 53, Last: 53}}, Peers: peers},
		},
		Egress: []verdict.PacketBlock{{Protocol: verdict.UDP, Ports: []verdict.PortRange{verdict.AllPorts}, Peers: peers}},
		Services: []verdict.PacketService{
			{Protocol: verdict.UDP, Addr: addrPort("10.96.0.10:53"), Endpoints: []netip.AddrPort{addrPort("10.64.0.3:53"), addrPort("10.64.0.4:53")}},
			{Protocol: verdict.UDP, Addr: addrPort("[fd96::10]:53"), Endpoints: []netip.AddrPort{addrPort("[fd64::3]:53")}},
			{Protocol: verdict.UDP, Addr: addrPort("[fd96::11]:30053")},
		},
	}
}

func TestPacketsRoundTrip(t *testing.T) {
	for _, want := range []*verdict.Packets{fullPackets(), {Ingress: []verdict.PacketBlock{}, Egress: []verdict.PacketBlock{}}} {
		b, err := MarshalPackets(want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := UnmarshalPackets(b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, equal, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})); diff != "" {
			t.Error(diff)
		}
		if got.Hash() != want.Hash() {
			t.Error("the hash is another")
		}
	}
	if n := len(PacketsMessage(fullPackets()).Peers); n != 2 {
		t.Errorf("%d lists of peers, not 2: equal ones are written once", n)
	}
}

func TestUnmarshalPacketsRefuses(t *testing.T) {
	type m = mantletv1.Packets
	unknown := func(x proto.Message) {
		x.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
	}
	for _, tt := range []struct {
		name   string
		change func(*m)
		want   string
	}{
		{"node without address", func(x *m) { x.Node[0] = nil }, "node[0]"},
		{"nodes unsorted", func(x *m) { x.Node[0], x.Node[1] = x.Node[1], x.Node[0] }, "node[1]"},
		{"node unspecified", func(x *m) { x.Node[0] = make([]byte, 4) }, "not one of a node"},
		{"TCP", func(x *m) { x.Ingress[0].Protocol = mantletv1.Protocol_PROTOCOL_TCP }, "ingress[0]: protocol 1 is not decided by address"},
		{"no protocol", func(x *m) { x.Egress[0].Protocol = 0 }, "egress[0]: protocol 0"},
		{"no ports", func(x *m) { x.Ingress[1].Ports = nil }, "ingress[1]: has no ports"},
		{"port 65536", func(x *m) { x.Ingress[0].Ports[1].Last = 65536 }, "ports[1]"},
		{"blocks unsorted", func(x *m) { b := x.Ingress; b[0], b[1] = b[1], b[0] }, "out of order"},
		{"blocks overlap", func(x *m) { x.Ingress[1].Ports[0].Last = 60 }, "is in two blocks"},
		{"no such peers", func(x *m) { x.Egress[0].Peers = 2 }, "egress[0]: there is no list 2"},
		{"peers not used", func(x *m) { x.Peers = append(x.Peers, &mantletv1.PacketPeers{}) }, "for nothing"},
		{"peers twice", func(x *m) {
			x.Peers = append(x.Peers, proto.CloneOf(x.Peers[0]))
			x.Egress[0].Peers = 2
		}, "written twice"},
		{"peers in another order", func(x *m) {
			x.Peers[0], x.Peers[1] = x.Peers[1], x.Peers[0]
			x.Ingress[0].Peers, x.Ingress[1].Peers, x.Ingress[2].Peers, x.Egress[0].Peers = 1, 0, 1, 1
		}, "out of order"},
		{"prefixes unsorted", func(x *m) { p := x.Peers[0].Prefixes; p[0], p[1] = p[1], p[0] }, "is not in order"},
		{"prefix of 33 bits", func(x *m) { x.Peers[1].Prefixes[0].Bits = 33 }, "peers[1].prefixes[0]: 10.0.0.0 has no prefix of 33 bits"},
		{"bits after the prefix", func(x *m) { x.Peers[1].Prefixes[0].Bits = 4 }, "not zero"},
		{"service over TCP", func(x *m) { x.Services[0].Protocol = mantletv1.Protocol_PROTOCOL_TCP }, "services[0]: protocol 1"},
		{"service without address", func(x *m) { x.Services[0].Address = nil }, "services[0]"},
		{"service on port 0", func(x *m) { x.Services[0].Address.Port = 0 }, "no address with a port"},
		{"service on port 65589", func(x *m) { x.Services[0].Address.Port = 65536 + 53 }, "services[0]"},
		{"services unsorted", func(x *m) { s := x.Services; s[0], s[1] = s[1], s[0] }, "not in order"},
		{"service twice", func(x *m) { x.Services[1] = x.Services[0] }, "twice"},
		{"endpoint of another family", func(x *m) { x.Services[1].Endpoints = x.Services[0].Endpoints }, "of its family"},
		{"endpoints unsorted", func(x *m) { e := x.Services[0].Endpoints; e[0], e[1] = e[1], e[0] }, "not in order"},
		{"endpoint without port", func(x *m) { x.Services[0].Endpoints[0].Port = 0 }, "with a port"},
		{"endpoint without address", func(x *m) { x.Services[0].Endpoints[1].Address = nil }, "services[0]: endpoints[1]"},
		{"unknown field", func(x *m) { unknown(x) }, "not known"},
		{"unknown field far down", func(x *m) { unknown(x.Peers[0].Prefixes[2]) }, "not known"},
		{"unknown field of an endpoint", func(x *m) { unknown(x.Services[0].Endpoints[0]) }, "not known"},
	} {
		x := PacketsMessage(fullPackets())
		tt.change(x)
		if v, err := UnmarshalPackets(marshal(t, x)); err == nil || !strings.Contains(err.Error(), tt.want) || v != nil {
			t.Errorf("%s: %v, want …%s…", tt.name, err, tt.want)
		}
	}
	for _, b := range [][]byte{{0xff}, []byte("no message")} {
		if _, err := UnmarshalPackets(b); err == nil {
			t.Errorf("%x: read", b)
		}
	}
}

// FuzzUnmarshalPackets wants that whatever is read is valid, and comes out as the message that came in.
func FuzzUnmarshalPackets(f *testing.F) {
	f.Add(marshal(f, PacketsMessage(fullPackets())))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := UnmarshalPackets(b)
		if err != nil {
			return
		}
		if err := p.Validate(); err != nil {
			t.Fatal(err)
		}
		again, err := MarshalPackets(p)
		if err != nil {
			t.Fatal(err)
		}
		in, out := new(mantletv1.Packets), new(mantletv1.Packets)
		if proto.Unmarshal(b, in) != nil || proto.Unmarshal(again, out) != nil || !proto.Equal(in, out) {
			t.Errorf("%v came out as %v", in, out)
		}
	})
}
