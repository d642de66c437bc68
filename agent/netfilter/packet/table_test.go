package packet

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// ICMP, and with it path MTU and neighbour discovery, and TCP are none of this table's business.
func TestNothingElseIsTouched(t *testing.T) {
	outside := surroundings(t)
	apply(t, verdict.Packets{})
	l := outside.Listen(t, "[::]:8080")
	for _, a := range []netip.Addr{peers[0], peers[4]} {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(a, 8080).String(), 10*time.Second)
		if err != nil {
			t.Fatalf("TCP to %s: %v", a, err)
		}
		defer c.Close()
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		ping(t, a)
		outside.Do(func() { ping(t, same(a, own)) })
	}
}

// ping sends an echo request and awaits the reply.
func ping(t *testing.T, a netip.Addr) {
	t.Helper()
	network, request, reply, header := "ip4:icmp", byte(8), byte(0), 20 // a raw IPv4 socket reads the IP header too
	if a.Is6() {
		network, request, reply, header = "ip6:ipv6-icmp", 128, 129, 0
	}
	c, err := net.Dial(network, a.String())
	if err != nil {
		t.Error(err)
		return
	}
	defer c.Close()
	echo := []byte{request, 0, 0, 0, 0, 7, 0, 1}
	if a.Is4() { // the kernel does it for ICMPv6
		binary.BigEndian.PutUint16(echo[2:], ^(uint16(request)<<8 + 7 + 1))
	}
	if _, err := c.Write(echo); err != nil {
		t.Errorf("ping %s: %v", a, err)
		return
	}
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 128)
	for {
		n, err := c.Read(buf)
		if err != nil {
			t.Errorf("ping %s: %v", a, err)
			return
		}
		if n >= header+8 && buf[header] == reply {
			return
		}
	}
}

// These send raw packets: kernels without such sockets filter them all the same.
func TestSCTP(t *testing.T) {
	judgedByPort(t, unix.IPPROTO_SCTP, verdict.SCTP, udp(1, 65535, "0.0.0.0/0", "::/0"))
}

func TestUDPLiteIsJudgedAsUDP(t *testing.T) {
	everywhere := udp(1, 65535, "0.0.0.0/0", "::/0")
	everywhere.Protocol = verdict.SCTP
	judgedByPort(t, unix.IPPROTO_UDPLITE, verdict.UDP, everywhere)
}

// judgedByPort wants an IP protocol judged by what policy says of one of its own, and not by what it says of another.
func judgedByPort(t *testing.T, number int, proto verdict.Protocol, other verdict.PacketBlock) {
	t.Helper()
	outside := surroundings(t)
	block := udp(36412, 36412, "10.99.0.3/32", "fd99::3/128")
	block.Protocol = proto
	p := verdict.Packets{Ingress: []verdict.PacketBlock{block, other}, Egress: []verdict.PacketBlock{block}}
	if other.Protocol < proto {
		p.Ingress = []verdict.PacketBlock{other, block}
	}
	apply(t, p)
	raw := func(out *podtest.Outside, a netip.Addr) (c net.PacketConn) {
		network := fmt.Sprintf("ip4:%d", number)
		if a.Is6() {
			network = fmt.Sprintf("ip6:%d", number)
		}
		var err error
		open := func() { c, err = net.ListenPacket(network, a.String()) }
		if out != nil {
			out.Do(open)
		} else {
			open()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	chunk := func(port uint16, word string) string { // a common header, and a word instead of chunks
		b := make([]byte, 12)
		binary.BigEndian.PutUint16(b, 4000)
		binary.BigEndian.PutUint16(b[2:], port)
		return string(b) + word
	}
	for _, node := range []netip.Addr{node4, node6} {
		at := raw(nil, same(node, own))
		dest := &net.IPAddr{IP: same(node, own).AsSlice()}
		for _, a := range peers {
			if a.Is4() != node.Is4() {
				continue
			}
			for _, port := range []uint16{36411, 36412} {
				send(t, raw(outside, a), dest, chunk(port, "in"))
				send(t, raw(outside, node), dest, chunk(port, "end"))
				want, got := p.AllowsIngress(proto, port, a), false
				for {
					word, _ := receive(t, at)
					if strings.HasSuffix(word, "end") {
						break
					}
					got = true
				}
				if got != want {
					t.Errorf("from %s to %d/%s: arrived=%v, want %v", a, port, proto, got, want)
				}
				want = p.AllowsEgress(proto, port, a)
				if got := send(t, at, &net.IPAddr{IP: a.AsSlice()}, chunk(port, "out")); got != want {
					t.Errorf("to %s %d/%s: sent=%v, want %v", a, port, proto, got, want)
				}
			}
		}
	}
}

// The agent resolves names with marked sockets, where the pod may not.
func TestMarkPassesAtEgress(t *testing.T) {
	outside := surroundings(t)
	apply(t, verdict.Packets{})
	there := socket(t, outside, "10.99.0.3:9057")
	if send(t, socket(t, nil, "10.99.0.2:0"), there.LocalAddr(), "app") {
		t.Error("an unmarked datagram was sent")
	}
	marked, err := (&net.ListenConfig{Control: netfilter.Exempt}).ListenPacket(t.Context(), "udp", "10.99.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	defer marked.Close()
	send(t, marked, there.LocalAddr(), "agent")
	if got, _ := receive(t, there); got != "agent" {
		t.Errorf("got %q", got)
	}
}

// The redirect's table and this one do not know each other.
func TestRedirectIsIndependent(t *testing.T) {
	surroundings(t)
	redirect, err := netfilter.New(netfilter.ByMark(), slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if err := redirect.Apply(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = redirect.Remove() })
	apply(t, verdict.Packets{})
	if err := redirect.Check(); err != nil {
		t.Error(err)
	}
	if err := redirect.Apply(); err != nil {
		t.Fatal(err)
	}
	if send(t, socket(t, nil, "10.99.0.2:0"), to(peers[0], 53), "x") {
		t.Error("writing the redirect took the packet policy away")
	}
	for range 2 {
		if err := Remove(kernel(t)); err != nil {
			t.Error(err)
		}
	}
	if err := redirect.Check(); err != nil {
		t.Error(err)
	}
}

// A table that the kernel does not take leaves the one before in force.
func TestRefusedTableChangesNothing(t *testing.T) {
	surroundings(t)
	apply(t, verdict.Packets{Egress: []verdict.PacketBlock{udp(53, 53, "10.99.0.3/32")}})
	rs, err := Emit(here(verdict.Packets{Egress: []verdict.PacketBlock{udp(53, 53, "0.0.0.0/0")}}), names.ProxyMark)
	if err != nil {
		t.Fatal(err)
	}
	rs.Chains[0].Rules = append(rs.Chains[0].Rules, goTo("nowhere"))
	if err := rs.Apply(kernel(t)); err == nil {
		t.Fatal("a rule that goes to no chain was taken")
	}
	if err := Apply(kernel(t), &verdict.Packets{Egress: []verdict.PacketBlock{udp(53, 53, "10.0.0.1/8")}}); err == nil {
		t.Fatal("a prefix with host bits was taken")
	}
	c := socket(t, nil, "10.99.0.2:0")
	if !send(t, c, to(peers[0], 53), "x") || send(t, c, to(peers[1], 53), "x") {
		t.Error("the table before is not in force")
	}
}

// TestTenThousandPrefixes applies 10,000 prefixes of each family, none next to another, in one transaction.
func TestTenThousandPrefixes(t *testing.T) {
	outside := surroundings(t)
	const n = 10000
	b := udp(9058, 9058)
	for i := range n {
		a := [4]byte{10, 96 + byte(i>>15), byte(i >> 7), byte(i << 1)}
		b.Peers = append(b.Peers, verdict.PacketPrefix{Prefix: netip.PrefixFrom(netip.AddrFrom4(a), 32), Allow: true})
	}
	b.Peers = append(b.Peers, verdict.PacketPrefix{Prefix: netip.MustParsePrefix("10.99.0.4/32"), Allow: true})
	for i := range n {
		a := netip.MustParseAddr("fd99::4").As16()
		binary.BigEndian.PutUint32(a[10:], uint32(i)<<1)
		b.Peers = append(b.Peers, verdict.PacketPrefix{Prefix: netip.PrefixFrom(netip.AddrFrom16(a), 128), Allow: true})
	}
	p := here(verdict.Packets{Ingress: []verdict.PacketBlock{b}})
	start := time.Now()
	rs, err := Emit(p, names.ProxyMark)
	if err != nil {
		t.Fatal(err)
	}
	emitted := time.Now()
	if err := rs.Apply(kernel(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Remove(kernel(t)) })
	applied := time.Now()
	if err := rs.Apply(kernel(t)); err != nil {
		t.Fatal(err)
	}
	t.Logf("2×%d prefixes: emitted in %v, applied in %v, replaced in %v", n, emitted.Sub(start), applied.Sub(emitted), time.Since(applied))
	got := arrivals(t, outside, socket(t, nil, "[::]:9058"), 9058)
	if len(got) != 2 || !got[peers[1]] || !got[peers[5]] {
		t.Errorf("arrived from %v, not from %s and %s", got, peers[1], peers[5])
	}
}

func TestEmitRefuses(t *testing.T) {
	p := &verdict.Packets{}
	if _, err := Emit(p, 0); err == nil {
		t.Error("mark 0 was taken")
	}
	tcp := udp(53, 53, "10.0.0.0/8")
	tcp.Protocol = verdict.TCP
	for name, blocks := range map[string][]verdict.PacketBlock{
		"TCP":              {tcp},
		"no ports":         {{Protocol: verdict.UDP}},
		"port 0":           {udp(0, 53)},
		"a range reversed": {udp(54, 53)},
		"a port twice":     {udp(50, 60, "10.0.0.0/8"), udp(60, 70)},
		"no order":         {udp(53, 53, "10.1.0.0/16", "10.0.0.0/8")},
		"a prefix twice":   {udp(53, 53, "10.0.0.0/8", "10.0.0.0/8")},
		"host bits":        {udp(53, 53, "10.0.0.1/8")},
		"IPv4-mapped":      {udp(53, 53, "::ffff:10.0.0.0/104")},
	} {
		if _, err := Emit(&verdict.Packets{Ingress: blocks}, 1); err == nil {
			t.Errorf("%s: taken at ingress", name)
		}
		if _, err := Emit(&verdict.Packets{Egress: blocks}, 1); err == nil {
			t.Errorf("%s: taken at egress", name)
		}
	}
	if _, err := Emit(&verdict.Packets{Node: addrs("0.0.0.0")}, 1); err == nil {
		t.Error("node 0.0.0.0 was taken")
	}
}

// Equal values give equal rules, so that they may be compared and kept.
func TestEmitIsDeterministic(t *testing.T) {
	p := here(verdict.Packets{Ingress: []verdict.PacketBlock{udp(53, 60, "10.0.0.0/9", "fd00::/8")}, Egress: []verdict.PacketBlock{udp(1, 9, "10.0.0.0/8")}})
	bytesOf := func() string {
		rs, err := Emit(p, 1)
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		for _, s := range rs.Sets {
			out.WriteString(s.Name)
			out.WriteByte(byte(s.ID))
			for _, e := range s.Elements {
				out.Write(e.Key)
			}
		}
		for _, c := range rs.Chains {
			out.WriteString(c.Name)
			for _, r := range c.Rules {
				for _, e := range r {
					b, err := expr.Marshal(byte(nftables.TableFamilyINet), e)
					if err != nil {
						t.Fatal(err)
					}
					out.Write(b)
				}
			}
		}
		return out.String()
	}
	if first, second := bytesOf(), bytesOf(); first != second {
		t.Error("the same value gave different rules")
	}
}

// Names stand for their content in every process: an agent that comes after another one finds its chains under the names that it would give them.
func TestNamesAreOfTheContent(t *testing.T) {
	rs, err := Emit(here(verdict.Packets{Egress: []verdict.PacketBlock{udp(1, 9, "10.0.0.0/8", "fd00::/8")}}), 1)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256([]byte("[10.0.0.0-10.255.255.255] [fd00::-fdff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]"))
	for _, want := range []string{"from-" + hex.EncodeToString(sum[:16]), "to-" + hex.EncodeToString(sum[:16])} {
		if !slices.ContainsFunc(rs.Chains, func(c Chain) bool { return c.Name == want }) {
			t.Errorf("no chain %s among %d", want, len(rs.Chains))
		}
	}
}

// Apply leaves exactly its table, whatever it finds: larger policies before, chains and sets that are not its own, a table put to sleep.
func TestApplyLeavesNothingElse(t *testing.T) {
	surroundings(t)
	small := here(verdict.Packets{Egress: []verdict.PacketBlock{udp(53, 53, "10.99.0.3/32")}})
	want, err := Emit(small, names.ProxyMark)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	for name, meddle := range map[string]func(){
		"no table": func() {},
		"a larger one": func() {
			apply(t, verdict.Packets{Ingress: []verdict.PacketBlock{udp(1, 9, "10.0.0.0/8"), udp(10, 19, "fd00::/8")}})
		},
		"the same":      func() { apply(t, *small) },
		"flushed":       func() { apply(t, *small); conn.FlushTable(want.Table) },
		"foreign chain": func() { apply(t, *small); conn.AddChain(&nftables.Chain{Name: "foreign", Table: want.Table}) },
		"asleep": func() {
			conn.AddTable(&nftables.Table{Name: TableName, Family: nftables.TableFamilyINet, Flags: 1}) // NFT_TABLE_F_DORMANT
			conn.AddChain(want.Chains[0].Chain)
		},
		"other hook": func() {
			c := *want.Chains[0].Chain
			c.Hooknum = nftables.ChainHookOutput
			conn.AddTable(want.Table)
			conn.AddChain(&c)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := Remove(kernel(t)); err != nil {
				t.Fatal(err)
			}
			meddle()
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
			apply(t, *small)
			tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
			if err != nil || len(tables) != 1 || tables[0].Flags != 0 {
				t.Fatalf("tables %+v, %v", tables, err)
			}
			chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
			if err != nil || len(chains) != len(want.Chains) {
				t.Errorf("%d chains, %v; want %d", len(chains), err, len(want.Chains))
			}
			sets, err := conn.GetSets(want.Table)
			if err != nil || len(sets) != len(want.Sets) {
				t.Errorf("%d sets, %v; want %d", len(sets), err, len(want.Sets))
			}
			c := socket(t, nil, "10.99.0.2:0")
			if !send(t, c, to(peers[0], 53), "x") || send(t, c, to(peers[1], 53), "x") || send(t, c, to(peers[0], 54), "x") {
				t.Error("the policy is not in force")
			}
		})
	}
}
