package wire

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/verdict"
)

var equal = cmp.Options{cmpopts.EquateComparable(netip.Prefix{}, spiffeid.ID{})}

// full uses everything that verdicts can say.
func full() *verdict.Verdicts {
	id := spiffeid.RequireFromString
	prefix := netip.MustParsePrefix
	return &verdict.Verdicts{
		Subject: id("spiffe://td.example/ns/shop/sa/db/labels/d"), Mode: verdict.Strict,
		Ingress: verdict.Table{
			Isolating: []string{"shop/db", "shop/more"},
			Rules:     []verdict.Rule{{Policy: "shop/db", Rule: "ingress[0]", Peers: "pods app=api", Ports: "5432/TCP"}},
			Reasons: []verdict.Reason{
				{Policy: "shop/db", Rule: "ingress[0]", Text: "admits"}, {Text: "another pod"}, {Policy: "shop/db", Rule: "ingress[0]", Text: "near", Nearest: true},
			},
			Blocks: []verdict.Block{
				{Protocol: verdict.TCP, Ports: []verdict.PortRange{{First: 80, Last: 80}, {First: 90, Last: 65535}}, Peers: verdict.Peers{
					ByIdentity: []verdict.Identity{
						{ID: id("spiffe://td.example/ns/shop/sa/api/labels/a"), Verdict: verdict.Verdict{Allow: true}},
						{ID: id("spiffe://td.example/ns/shop/sa/web/labels/b"), Verdict: verdict.Verdict{Reason: 1}, Addresses: []verdict.Prefix{
							{Prefix: prefix("10.64.0.9/32"), Verdict: verdict.Verdict{Allow: true}}, {Prefix: prefix("fd64::9/128"), Verdict: verdict.Verdict{Reason: 2}}}},
					},
					Identified: []verdict.Prefix{{Prefix: prefix("0.0.0.0/0"), Verdict: verdict.Verdict{Allow: true}}, {Prefix: prefix("0.0.0.0/1"), Verdict: verdict.Verdict{Reason: 1}}},
				}},
				{Protocol: verdict.TCP, Ports: []verdict.PortRange{{First: 82, Last: 84}}, Peers: verdict.Peers{
					Anonymous: []verdict.Prefix{{Prefix: prefix("::/0"), Verdict: verdict.Verdict{Allow: true}}}}},
				{Protocol: verdict.SCTP, Ports: []verdict.PortRange{{First: 80, Last: 80}}, Peers: verdict.Peers{
					Anonymous: []verdict.Prefix{{Prefix: prefix("::/0"), Verdict: verdict.Verdict{Allow: true}}}}},
			},
		},
		Egress: verdict.Table{Reasons: []verdict.Reason{}, Blocks: []verdict.Block{}},
	}
}

func marshal(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	want := full()
	b, err := Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Unmarshal(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, equal); diff != "" {
		t.Error(diff)
	}
	if got.Hash() != want.Hash() {
		t.Error("the hash is another")
	}
}

func TestUnmarshalRefuses(t *testing.T) {
	type m = mantletv1.Verdicts
	unknown := func(x proto.Message) {
		x.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
	}
	first := func(x *m) *mantletv1.Block { return x.Ingress.Blocks[0] }
	for _, tt := range []struct {
		name   string
		change func(*m)
		want   string
	}{
		{"no subject", func(x *m) { x.Subject = "" }, "subject"},
		{"no mode", func(x *m) { x.Mode = 0 }, "mode 0"},
		{"later mode", func(x *m) { x.Mode = 3 }, "mode 3"},
		{"no ingress", func(x *m) { x.Ingress = nil }, "ingress: is missing"},
		{"no egress", func(x *m) { x.Egress = nil }, "egress: is missing"},
		{"no SPIFFE ID", func(x *m) { x.Identities[0] = "api" }, "identities[0]"},
		{"identities unsorted", func(x *m) { x.Identities[0], x.Identities[1] = x.Identities[1], x.Identities[0] }, "identities[1]"},
		{"identities twice", func(x *m) { x.Identities[1] = x.Identities[0] }, "identities[1]"},
		{"identity not used", func(x *m) { x.Identities = append(x.Identities, "spiffe://td.example/z") }, "nothing points at"},
		{"identity out of range", func(x *m) { first(x).ByIdentity[1].Id = 2 }, "no identity 2"},
		{"peers unsorted", func(x *m) { first(x).ByIdentity[0].Id, first(x).ByIdentity[1].Id = 1, 0 }, "by_identity[1]"},
		{"peers twice", func(x *m) { first(x).ByIdentity[0].Id = 1 }, "by_identity[1]"},
		{"peer allowed elsewhere too", func(x *m) { first(x).ByIdentity[1].Allow = true }, "addresses decide"},
		{"peer's reason out of range", func(x *m) { first(x).ByIdentity[0].Reason = 3 }, "by_identity[0]: there is no reason 3"},
		{"peer's address unsorted", func(x *m) { a := first(x).ByIdentity[1].Addresses; a[0], a[1] = a[1], a[0] }, "by_identity[1].addresses[1]"},
		{"isolating unsorted", func(x *m) { x.Ingress.Isolating[0] = "z" }, "isolating[1]"},
		{"isolating empty", func(x *m) { x.Ingress.Isolating[0] = "" }, "isolating[0]"},
		{"reason twice", func(x *m) { x.Ingress.Reasons[1] = x.Ingress.Reasons[0] }, "reasons[1]"},
		{"no protocol", func(x *m) { first(x).Protocol = 0 }, "protocol 0"},
		{"later protocol", func(x *m) { first(x).Protocol = 4 }, "protocol 4"},
		{"no ports", func(x *m) { first(x).Ports = nil }, "no ports"},
		{"port 0", func(x *m) { first(x).Ports[0].First = 0 }, "ports[0]"},
		{"port 65536", func(x *m) { first(x).Ports[1].Last = 65536 }, "ports[1]"},
		{"range backwards", func(x *m) { first(x).Ports[0].First = 81 }, "ports[0]"},
		{"ranges unsorted", func(x *m) { p := first(x).Ports; p[0], p[1] = p[1], p[0] }, "ports[1]"},
		{"ranges overlap", func(x *m) { first(x).Ports[0].Last = 90 }, "ports[1]"},
		{"ranges touch", func(x *m) { first(x).Ports[0].Last = 89 }, "ports[1]"},
		{"blocks overlap", func(x *m) { x.Ingress.Blocks[1].Ports[0].Last = 90 }, "port 90/TCP"},
		{"blocks share a port", func(x *m) { x.Ingress.Blocks[1].Ports[0].First = 80 }, "out of order"},
		{"blocks unsorted", func(x *m) { b := x.Ingress.Blocks; b[0], b[1] = b[1], b[0] }, "blocks[1]"},
		{"protocols unsorted", func(x *m) { b := x.Ingress.Blocks; b[1], b[2] = b[2], b[1] }, "blocks[2]"},
		{"no address", func(x *m) { first(x).Identified[0].Address = nil }, "identified[0]"},
		{"address of 5 bytes", func(x *m) { first(x).Identified[0].Address = make([]byte, 5) }, "identified[0]"},
		{"IPv4-mapped address", func(x *m) {
			a := netip.MustParseAddr("::ffff:10.0.0.1").As16()
			x.Ingress.Blocks[1].Anonymous[0].Address, x.Ingress.Blocks[1].Anonymous[0].Bits = a[:], 128
		}, "anonymous[0]"},
		{"33 bits", func(x *m) { first(x).Identified[1].Bits = 33 }, "33 bits"},
		{"bits past int32", func(x *m) { first(x).Identified[1].Bits = 1 << 31 }, "no prefix"},
		{"bits after the prefix", func(x *m) { first(x).Identified[1].Address = []byte{0, 0, 0, 1} }, "not zero"},
		{"prefixes unsorted", func(x *m) { p := first(x).Identified; p[0], p[1] = p[1], p[0] }, "identified[1]"},
		{"prefix twice", func(x *m) { first(x).Identified[1].Bits = 0 }, "identified[1]"},
		{"reason out of range", func(x *m) { first(x).Identified[1].Reason = 3 }, "no reason 3"},
		{"reason of another table", func(x *m) { x.Egress.Blocks = x.Ingress.Blocks }, "egress: blocks[0]"},
		{"unknown field", func(x *m) { unknown(x) }, "not known"},
		{"unknown field far down", func(x *m) { unknown(first(x).ByIdentity[1].Addresses[0]) }, "not known"},
		{"unknown field of a reason", func(x *m) { unknown(x.Ingress.Reasons[0]) }, "not known"},
	} {
		x := Message(full())
		tt.change(x)
		if v, err := Unmarshal(marshal(t, x)); err == nil || !strings.Contains(err.Error(), tt.want) || v != nil {
			t.Errorf("%s: %v, want …%s…", tt.name, err, tt.want)
		}
	}
	for _, b := range [][]byte{nil, {0xff}, []byte("no message")} {
		if _, err := Unmarshal(b); err == nil {
			t.Errorf("%x: read", b)
		}
	}
}

// FuzzUnmarshal wants that whatever is read can be decided by, and comes out as the message that came in.
func FuzzUnmarshal(f *testing.F) {
	f.Add(marshal(f, Message(full())))
	f.Add(marshal(f, Message(&verdict.Verdicts{Subject: full().Subject, Mode: verdict.Permissive})))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := Unmarshal(b)
		if err != nil {
			return
		}
		for _, e := range []*verdict.Evaluator{verdict.NewIngress(v), verdict.NewEgress(v)} {
			for _, p := range verdict.Protocols {
				for _, peer := range []verdict.Peer{{Addr: netip.MustParseAddr("10.64.0.9")}, {ID: v.Subject, Addr: netip.MustParseAddr("fd64::9")}} {
					e.Decide(p, 80, peer)
				}
			}
		}
		again, err := Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		in, out := new(mantletv1.Verdicts), new(mantletv1.Verdicts)
		if proto.Unmarshal(b, in) != nil || proto.Unmarshal(again, out) != nil || !proto.Equal(in, out) {
			t.Errorf("%v came out as %v", in, out)
		}
	})
}
