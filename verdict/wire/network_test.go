package wire

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/encoding/protowire"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
)

func TestNetwork(t *testing.T) {
	want := Network{
		Cluster: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/64"), netip.MustParsePrefix("0.0.0.0/0")},
		Node:    []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
	}
	got, err := UnmarshalNetwork(marshal(t, NetworkMessage(want)))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{})); diff != "" {
		t.Error(diff)
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
		"a field that is not known": func(m *mantletv1.Network) {
			m.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
		},
	} {
		m := NetworkMessage(Network{Cluster: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
		change(m)
		if _, err := UnmarshalNetwork(marshal(t, m)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, not %q", err, want)
		}
	}
	if _, err := UnmarshalNetwork([]byte{0xff}); err == nil {
		t.Error("no message at all is taken")
	}
}
