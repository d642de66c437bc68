package wire

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/encoding/protowire"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/verdict"
)

func TestNetwork(t *testing.T) {
	want := verdict.Network{
		Cluster:   []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/64"), netip.MustParsePrefix("0.0.0.0/0")},
		Node:      []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
		Services:  []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:80"), netip.MustParseAddrPort("192.0.2.1:443"), netip.MustParseAddrPort("[2001:db8::9]:443")},
		NodePorts: verdict.PortRange{First: 20000, Last: 20999},
	}
	got, err := UnmarshalNetwork(marshal(t, NetworkMessage(&want)))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}, netip.AddrPort{})); diff != "" {
		t.Error(diff)
	}
	before := marshal(t, NetworkMessage(&want))
	want.HostPorts = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:80"), netip.MustParseAddrPort("192.0.2.1:81"), netip.MustParseAddrPort("[2001:db8::1]:80")}
	got, err = UnmarshalNetwork(marshal(t, NetworkMessage(&want))) // as agents do that know of no host ports
	if asked := "[192.0.2.1:80 192.0.2.1:81 192.0.2.1:443 [2001:db8::1]:80 [2001:db8::9]:443]"; err != nil || fmt.Sprint(got.Services) != asked || got.HostPorts != nil {
		t.Errorf("%v, services %v, host ports %v; want %s", err, got.Services, got.HostPorts, asked)
	}
	if want.HostPorts = []netip.AddrPort{}; !bytes.Equal(before, marshal(t, NetworkMessage(&want))) {
		t.Error("without host ports it is not the message that it was")
	}
	want.NodePorts = verdict.DefaultNodePorts // which agents that know no other understand
	if m := NetworkMessage(&want); m.NodePorts != nil {
		t.Errorf("the default range is written: %v", m.NodePorts)
	}
}

func TestUnmarshalNetworkRefuses(t *testing.T) {
	type prefix = mantletv1.Prefix
	for want, change := range map[string]func(m *mantletv1.Network){
		"no cluster prefixes": func(m *mantletv1.Network) { m.Cluster = nil },
		"cluster[1]: 0a0000 is no address": func(m *mantletv1.Network) {
			m.Cluster = append(m.Cluster, &prefix{Address: []byte{10, 0, 0}, Bits: 8})
		},
		"cluster[1]: 00000000000000000000ffff0a000000 is no address": func(m *mantletv1.Network) {
			m.Cluster = append(m.Cluster, &prefix{Address: []byte{10: 0xff, 0xff, 10, 0, 0, 0}, Bits: 104})
		},
		"cluster[1]: 10.0.0.1/8 is not a masked prefix": func(m *mantletv1.Network) {
			m.Cluster = append(m.Cluster, &prefix{Address: []byte{10, 0, 0, 1}, Bits: 8})
		},
		"cluster[1]: 10.0.0.0/33 is not a masked prefix": func(m *mantletv1.Network) {
			m.Cluster = append(m.Cluster, &prefix{Address: []byte{10, 0, 0, 0}, Bits: 33})
		},
		"cluster[1]: 10.0.0.0/4294967295 is not": func(m *mantletv1.Network) {
			m.Cluster = append(m.Cluster, &prefix{Address: []byte{10, 0, 0, 0}, Bits: 1<<32 - 1})
		},
		"node[0]: 01 is no address": func(m *mantletv1.Network) { m.Node = [][]byte{{1}} },
		"services[0]: 01 and 80 are no address with a port": func(m *mantletv1.Network) {
			m.Services = append(m.Services, &mantletv1.AddressPort{Address: []byte{1}, Port: 80})
		},
		"services[0]: cb007101 and 65536 are no address with a port": func(m *mantletv1.Network) {
			m.Services = append(m.Services, &mantletv1.AddressPort{Address: []byte{203, 0, 113, 1}, Port: 65536})
		},
		"services[1]: 203.0.113.1:80 is not in order, or twice": func(m *mantletv1.Network) {
			a := &mantletv1.AddressPort{Address: []byte{203, 0, 113, 1}, Port: 80}
			m.Services = append(m.Services, a, a)
		},
		"node ports 2-1 are no range":     func(m *mantletv1.Network) { m.NodePorts = &mantletv1.PortRange{First: 2, Last: 1} },
		"node ports 1-65536 are no range": func(m *mantletv1.Network) { m.NodePorts = &mantletv1.PortRange{First: 1, Last: 65536} },
		"a field that is not known": func(m *mantletv1.Network) { // the default range
			m.NodePorts = &mantletv1.PortRange{First: 30000, Last: 32767}
		},
		"network: a field that is not known": func(m *mantletv1.Network) {
			m.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
		},
	} {
		m := NetworkMessage(&verdict.Network{Cluster: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
		change(m)
		if _, err := UnmarshalNetwork(marshal(t, m)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, not %q", err, want)
		}
	}
	if _, err := UnmarshalNetwork([]byte{0xff}); err == nil {
		t.Error("no message at all is taken")
	}
}
