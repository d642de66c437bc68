package random

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter/packet"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/test/oracle/nftrules"
	"github.com/mantlet/mantlet/verdict"
)

// packetEnds are both directions of something that judges packets in the pods' network namespaces.
type packetEnds interface {
	ingress(pod string, proto verdict.Protocol, port uint16, from netip.Addr) bool
	egress(pod string, proto verdict.Protocol, port uint16, to netip.Addr) bool
}

// packetsDiffer returns the first UDP or SCTP flow on which the two ends' packet policies and the oracle differ. There is no slipping past
// a sidecar here: what the pod sends passes the same rules whoever in it sends it.
func packetsDiffer(w oracle.World, ends packetEnds) (found error) {
	for _, c := range w.Connections() {
		if c.Protocol == verdict.TCP || c.Plaintext {
			continue
		}
		want, why := w.Allowed(c)
		got := true
		if isPod(c.From) && c.From == c.To {
			continue // what a pod sends to itself never leaves it, and the value does not speak of it
		}
		if isPod(c.From) && oracle.Sidecar(c.From) {
			got = ends.egress(key(c.From), c.Protocol, c.Port, c.ToAddr)
		}
		if isPod(c.To) && oracle.Sidecar(c.To) {
			got = got && ends.ingress(key(c.To), c.Protocol, c.Port, c.FromAddr)
		}
		if got != want {
			return fmt.Errorf("%s: allowed=%v; the oracle: %v, %s", c, got, want, why)
		}
	}
	return nil
}

// byValue judges by the compiled value.
type byValue map[string]*verdict.Packets

func (v byValue) ingress(pod string, proto verdict.Protocol, port uint16, from netip.Addr) bool {
	return v[pod].AllowsIngress(proto, port, from)
}

func (v byValue) egress(pod string, proto verdict.Protocol, port uint16, to netip.Addr) bool {
	return v[pod].AllowsEgress(proto, port, to)
}

// packetsOf compiles the packet policy of every pod that has a sidecar, and wants valid values.
func packetsOf(w oracle.World, x *policy.Index) (byValue, error) {
	out := byValue{}
	for _, p := range w.Objects.Pods {
		if !isPod(p) || !oracle.Sidecar(p) {
			continue
		}
		v := x.Packets(key(p))
		if err := v.Validate(); err != nil {
			return nil, fmt.Errorf("pod %s: %w", key(p), err)
		}
		out[key(p)] = v
	}
	return out, nil
}

func TestPacketsAgreeWithOracle(t *testing.T) {
	check := func(w oracle.World) error {
		x, err := indexOf(w)
		if err != nil {
			return err
		}
		v, err := packetsOf(w, x)
		if err != nil {
			return err
		}
		return packetsDiffer(w, v)
	}
	for i := range *worlds {
		w := oracle.Generate(rand.New(rand.NewPCG(*seed+uint64(i), 0)), oracle.Small)
		if check(w) == nil {
			continue
		}
		small := oracle.Shrink(w, func(w oracle.World) bool { return check(w) != nil })
		t.Fatalf("world %d: %v\n%s", *seed+uint64(i), check(small), small.YAML())
	}
}

// TestPacketsDependOnObjectsAlone feeds the same objects in another order, and wants the same values.
func TestPacketsDependOnObjectsAlone(t *testing.T) {
	for i := range *worlds {
		r := rand.New(rand.NewPCG(*seed+uint64(i), 5))
		w := oracle.Generate(r, oracle.Small)
		want, err := indexOf(w)
		if err != nil {
			t.Fatal(err)
		}
		x, _ := indexOf(oracle.World{PodNetwork: w.PodNetwork, Mode: w.Mode})
		all := objects(&w.Objects)
		r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, o := range all {
			if _, err := x.Apply(o); err != nil {
				t.Fatal(err)
			}
			if p := w.Objects.Pods[r.IntN(len(w.Objects.Pods))]; r.IntN(3) == 0 {
				x.Packets(key(p)) // what it says of a world half known must not stay
			}
		}
		for _, p := range w.Objects.Pods {
			a, b := want.Packets(key(p)), x.Packets(key(p))
			if a.Hash() != b.Hash() {
				t.Fatalf("world %d: pod %s: packets depend on the order of events\n%s", *seed+uint64(i), key(p), w.YAML())
			}
		}
	}
	x, _ := indexOf(oracle.World{})
	if got := x.Packets("no/such"); got.Hash() != (&verdict.Packets{}).Hash() {
		t.Errorf("a pod that does not exist: %+v", got)
	}
}

// byRules judges by the rules that the kernel would get.
type byRules map[string]*guardedPod

type guardedPod struct {
	rules *packet.Ruleset
}

const proxyMark = 0x6d74

func rulesOf(v byValue) (byRules, error) {
	out := byRules{}
	for pod, p := range v {
		rules, err := packet.Emit(p, proxyMark)
		if err != nil {
			return nil, fmt.Errorf("pod %s: %w", pod, err)
		}
		out[pod] = &guardedPod{rules}
	}
	return out, nil
}

var ipProtocol = map[verdict.Protocol]byte{verdict.TCP: unix.IPPROTO_TCP, verdict.UDP: unix.IPPROTO_UDP, verdict.SCTP: unix.IPPROTO_SCTP}

func (r byRules) ingress(pod string, proto verdict.Protocol, port uint16, from netip.Addr) bool {
	return r[pod].served(ipProtocol[proto], port, from, ephemeral)
}

func (r byRules) egress(pod string, proto verdict.Protocol, port uint16, to netip.Addr) bool {
	return r[pod].used(ipProtocol[proto], port, to, ephemeral)
}

// self is the pod's address of a family. No rule looks at it.
func self(peer netip.Addr) netip.Addr {
	if peer.Is4() {
		return netip.MustParseAddr("10.64.0.2")
	}
	return netip.MustParseAddr("fd00::2")
}

const ephemeral = 40000

// served says whether a peer may use a port of the pod: both what it sends, and what goes back. Rules that judge the two differently are a panic.
func (g *guardedPod) served(proto byte, port uint16, from netip.Addr, with uint16) bool {
	sent := g.arrives(nftrules.Packet{Protocol: proto, Source: from, Port: port, SourcePort: with})
	back := g.leaves(nftrules.Packet{Protocol: proto, Dest: from, Port: with, SourcePort: port, Flow: nftrules.Flow{Direction: nftrules.Reply}})
	if sent != back {
		panic(fmt.Sprintf("from %s to port %d of protocol %d: what is sent passes: %v, replies: %v", from, port, proto, sent, back))
	}
	return sent
}

// used says the same of the pod and a peer's port.
func (g *guardedPod) used(proto byte, port uint16, to netip.Addr, with uint16) bool {
	sent := g.leaves(nftrules.Packet{Protocol: proto, Dest: to, Port: port, SourcePort: with})
	back := g.arrives(nftrules.Packet{Protocol: proto, Source: to, Port: with, SourcePort: port, Flow: nftrules.Flow{Direction: nftrules.Reply}})
	if sent != back {
		panic(fmt.Sprintf("to port %d of protocol %d at %s: what is sent passes: %v, replies: %v", port, proto, to, sent, back))
	}
	return sent
}

// arrives judges a packet that comes in.
func (g *guardedPod) arrives(p nftrules.Packet) bool {
	p.Dest, p.In = self(p.Source), "eth0"
	return judge(g.rules, nftables.ChainHookPrerouting, p)
}

func (g *guardedPod) leaves(p nftrules.Packet) bool {
	p.Source, p.Out = self(p.Dest), "eth0"
	return judge(g.rules, nftables.ChainHookPostrouting, p)
}

func judge(rules *packet.Ruleset, hook *nftables.ChainHook, p nftrules.Packet) bool {
	ok, err := nftrules.Judge(rules, hook, p)
	if err != nil {
		panic(err) // the rules cannot be understood, whatever the packet
	}
	return ok
}

func TestPacketRulesAgreeWithOracle(t *testing.T) {
	check := func(w oracle.World) error {
		x, err := indexOf(w)
		if err != nil {
			return err
		}
		v, err := packetsOf(w, x)
		if err != nil {
			return err
		}
		rules, err := rulesOf(v)
		if err != nil {
			return err
		}
		return packetsDiffer(w, rules)
	}
	for i := range (*worlds + 2) / 3 { // values are held against the oracle above, and rules against values below
		w := oracle.Generate(rand.New(rand.NewPCG(*seed+uint64(i), 0)), oracle.Small)
		if check(w) == nil {
			continue
		}
		small := oracle.Shrink(w, func(w oracle.World) bool { return check(w) != nil })
		t.Fatalf("world %d: %v\n%s", *seed+uint64(i), check(small), small.YAML())
	}
}

// TestPacketRulesAgreeWithValue makes values of all shapes, not only those that policies compile to, and asks at every edge.
func TestPacketRulesAgreeWithValue(t *testing.T) {
	for i := range *worlds {
		r := rand.New(rand.NewPCG(*seed+uint64(i), 4))
		p := randomPackets(r)
		rules, err := packet.Emit(&p, proxyMark)
		if err != nil {
			t.Fatalf("value %d: %v\n%+v", i, err, p)
		}
		g := &guardedPod{rules}
		for _, proto := range []verdict.Protocol{verdict.UDP, verdict.SCTP} {
			for _, port := range edgePorts(&p) {
				for _, a := range edgeAddrs(&p) {
					with := uint16(r.Uint32())
					if got, want := g.served(ipProtocol[proto], port, a, with), p.AllowsIngress(proto, port, a); got != want {
						t.Fatalf("value %d: from %s to %d/%s: rules %v, value %v\n%+v", i, a, port, proto, got, want, p)
					}
					if got, want := g.used(ipProtocol[proto], port, a, with), p.AllowsEgress(proto, port, a); got != want {
						t.Fatalf("value %d: to %s %d/%s: rules %v, value %v\n%+v", i, a, port, proto, got, want, p)
					}
				}
			}
		}
	}
}

// TestPacketRulesLetPass: what is no UDP and no SCTP, loopback, and at egress the proxy's mark with its replies, even where nothing is admitted.
func TestPacketRulesLetPass(t *testing.T) {
	rules, err := packet.Emit(&verdict.Packets{}, proxyMark)
	if err != nil {
		t.Fatal(err)
	}
	for _, peer := range []netip.Addr{netip.MustParseAddr("10.64.0.3"), netip.MustParseAddr("fd00::3")} {
		base := nftrules.Packet{Protocol: unix.IPPROTO_UDP, Source: peer, Dest: peer, Port: 53, In: "eth0", Out: "eth0"}
		for _, c := range []struct {
			what    string
			change  func(*nftrules.Packet)
			in, out bool
		}{
			{"a new flow", func(*nftrules.Packet) {}, false, false},
			{"untracked", func(p *nftrules.Packet) { p.Flow.Direction = nftrules.Untracked }, false, false},
			{"untracked SCTP", func(p *nftrules.Packet) { p.Protocol, p.Flow.Direction = unix.IPPROTO_SCTP, nftrules.Untracked }, false, false},
			{"new SCTP", func(p *nftrules.Packet) { p.Protocol = unix.IPPROTO_SCTP }, false, false},
			{"an interface whose name begins with lo", func(p *nftrules.Packet) { p.In, p.Out = "lo1", "lo1" }, false, false},
			{"the pod's own address as the source, from outside", func(p *nftrules.Packet) { p.Source, p.Dest = self(peer), self(peer) }, false, false},
			{"a reply", func(p *nftrules.Packet) { p.Flow.Direction = nftrules.Reply }, false, false},
			{"a reply in SCTP", func(p *nftrules.Packet) { p.Protocol, p.Flow.Direction = unix.IPPROTO_SCTP, nftrules.Reply }, false, false},
			{"a reply to the proxy", func(p *nftrules.Packet) { p.Flow = nftrules.Flow{Direction: nftrules.Reply, Mark: proxyMark} }, true, false},
			{"a reply to another mark", func(p *nftrules.Packet) { p.Flow = nftrules.Flow{Direction: nftrules.Reply, Mark: proxyMark | 1<<16} }, false, false},
			{"a flow of the proxy's mark, from another", func(p *nftrules.Packet) { p.Flow.Mark = proxyMark }, false, false},
			{"loopback", func(p *nftrules.Packet) { p.In, p.Out = "lo", "lo" }, true, true},
			{"the proxy's mark", func(p *nftrules.Packet) { p.Mark = proxyMark }, false, true},
			{"another mark", func(p *nftrules.Packet) { p.Mark = proxyMark | 1<<16 }, false, false},
			{"TCP", func(p *nftrules.Packet) { p.Protocol = unix.IPPROTO_TCP }, true, true},
			{"ICMP", func(p *nftrules.Packet) { p.Protocol = unix.IPPROTO_ICMP }, true, true},
			{"ICMPv6", func(p *nftrules.Packet) { p.Protocol = unix.IPPROTO_ICMPV6 }, true, true},
		} {
			p := base
			c.change(&p)
			if got := judge(rules, nftables.ChainHookPrerouting, p); got != c.in {
				t.Errorf("%s from %s: accepted=%v", c.what, p.Source, got)
			}
			if got := judge(rules, nftables.ChainHookPostrouting, p); got != c.out {
				t.Errorf("%s to %s: accepted=%v", c.what, p.Dest, got)
			}
		}
	}
}

// randomPackets is a value with prefixes of all lengths, inside each other and at both ends of both families.
func randomPackets(r *rand.Rand) verdict.Packets {
	bases := []netip.Addr{netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("10.64.0.8"), netip.MustParseAddr("10.64.0.9"), netip.MustParseAddr("255.255.255.255"),
		netip.MustParseAddr("::"), netip.MustParseAddr("fd00::8"), netip.MustParseAddr("fd00::9"), netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")}
	blocks := func() (out []verdict.PacketBlock) {
		for _, proto := range []verdict.Protocol{verdict.UDP, verdict.SCTP} {
			var mine []verdict.PacketBlock
			for range r.IntN(3) {
				seen := map[netip.Prefix]bool{}
				b := verdict.PacketBlock{Protocol: proto}
				for range r.IntN(8) {
					a := bases[r.IntN(len(bases))]
					bits := r.IntN(a.BitLen() + 1)
					if r.IntN(2) == 0 {
						bits = a.BitLen() - r.IntN(4)
					}
					q := netip.PrefixFrom(a, bits).Masked()
					if !seen[q] {
						seen[q] = true
						b.Peers = append(b.Peers, verdict.PacketPrefix{Prefix: q, Allow: r.IntN(3) > 0})
					}
				}
				slices.SortFunc(b.Peers, verdict.PacketPrefix.Compare)
				mine = append(mine, b)
			}
			if len(mine) > 0 {
				cuts := []uint16{1, 53, 54, 8000, 8080, 65535}
				for i, first := range cuts {
					last := uint16(65535)
					if i+1 < len(cuts) {
						last = cuts[i+1] - 1
					}
					if r.IntN(4) > 0 {
						b := &mine[r.IntN(len(mine))]
						b.Ports = append(b.Ports, verdict.PortRange{First: first, Last: last})
					}
				}
			}
			out = append(out, slices.DeleteFunc(mine, func(b verdict.PacketBlock) bool { return len(b.Ports) == 0 })...)
		}
		return out
	}
	return verdict.Packets{
		Node: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}, Ingress: blocks(), Egress: blocks(),
	}
}

func edgePorts(p *verdict.Packets) []uint16 {
	out := []uint16{0, 1, 65535}
	for _, b := range slices.Concat(p.Ingress, p.Egress) {
		for _, r := range b.Ports {
			out = append(out, r.First-1, r.First, r.Last, r.Last+1)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func edgeAddrs(p *verdict.Packets) []netip.Addr {
	out := append(slices.Clone(p.Node), netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("2001:db8:9::7"))
	for _, b := range slices.Concat(p.Ingress, p.Egress) {
		for _, q := range b.Peers {
			raw := q.Prefix.Addr().AsSlice()
			for i := q.Prefix.Bits(); i < len(raw)*8; i++ {
				raw[i/8] |= 0x80 >> (i % 8)
			}
			last, _ := netip.AddrFromSlice(raw)
			out = append(out, q.Prefix.Addr(), last, q.Prefix.Addr().Prev(), last.Next())
		}
	}
	// The value takes an IPv4-mapped address for IPv4, which it is in a socket; in a packet it is IPv6.
	out = slices.DeleteFunc(out, func(a netip.Addr) bool { return !a.IsValid() || a.Is4In6() })
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}
