package packet

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
)

// TableName is the table in the family inet.
const TableName = "mantlet_packet"

// Ruleset is the table as the kernel gets it.
type Ruleset struct {
	Table  *nftables.Table
	Sets   []Set
	Chains []Chain
}

// Set is a set or map with its elements. Those of intervals are a first key and, with IntervalEnd, the key after the last; the last interval
// of a set that reaches the greatest key has no end.
type Set struct {
	*nftables.Set
	Elements []nftables.SetElement
}

// Chain is a chain with its rules.
type Chain = netfilter.Chain

// direction is what differs between ingress and egress.
type direction struct {
	name     string
	replies  string // the direction of the flows whose replies come through this one's hook
	hook     *nftables.ChainHook
	iface    expr.MetaKey
	blocks   []verdict.PacketBlock
	accepted []netip.Addr // always
	mark     uint32       // accepted always; zero: none
	// services are those whose ports at the accepted addresses no reply goes to.
	services []verdict.PacketService
	// begins and answers are where a flow's packets have the peer, and the port that was asked for: on the way that it began, and on the way back.
	begins, answers sides
}

// sides are offsets in the headers of a packet.
type sides struct {
	name   string // of the chains that look at the peer there
	v4, v6 uint32 // the peer's address
	port   uint32
}

func peerSends(port uint32) sides { return sides{name: "from-", v4: 12, v6: 8, port: port} }
func peerGets(port uint32) sides  { return sides{name: "to-", v4: 16, v6: 24, port: port} }

const (
	sourcePort      = 0 // in the header of UDP and SCTP
	destinationPort = 2
)

// Emit makes the rules for a packet policy. Marked packets pass at egress. Equal values give equal rules. It fails for a value that is not
// valid, and for mark 0, which every ordinary socket has.
func Emit(p *verdict.Packets, mark uint32) (*Ruleset, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if mark == 0 {
		return nil, errors.New("packets: mark 0 is the mark of every ordinary socket; choose another")
	}
	rs := &Ruleset{Table: &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}}
	e := emission{rules: rs, made: map[string]bool{}}
	e.direction(direction{name: "ingress", replies: "egress", hook: nftables.ChainHookPrerouting, iface: expr.MetaKeyIIFNAME,
		begins: peerSends(destinationPort), answers: peerGets(sourcePort), blocks: p.Ingress, accepted: p.Node, services: p.Services})
	e.direction(direction{name: "egress", replies: "ingress", hook: nftables.ChainHookPostrouting, iface: expr.MetaKeyOIFNAME,
		begins: peerGets(destinationPort), answers: peerSends(sourcePort), blocks: p.Egress, accepted: p.Node, mark: mark})
	e.services(p.Services, mark)
	rs.Chains = append(rs.Chains, e.led...)
	return rs, nil
}

// emission is a table in the making.
type emission struct {
	rules *Ruleset
	made  map[string]bool // names that stand for what they are made of
	led   []Chain         // those that maps lead to
}

// direction adds, in nft's own language and for each protocol:
//
//	chain ingress { type filter hook prerouting priority 0; policy accept;
//		meta l4proto udp goto ingress-udp
//		meta l4proto udplite goto ingress-udp
//	}
//	chain ingress-udp {
//		iifname "lo" accept
//		ct direction reply goto egress-udp-replies
//		meta mark 0x6d74 ct mark set meta mark accept # at egress: the agent's own
//		ip saddr 10.0.0.1 accept                 # own node
//		th dport vmap @ingress-udp-ports         # 1-52 : jump from-6f1d…, …
//		drop
//	}
//
// and for what goes back on the flows of this direction, which comes through the other one's hook:
//
//	chain ingress-udp-replies {
//		ct mark 0x6d74 accept                    # at egress
//		ip daddr 10.0.0.1 th dport @ingress-udp-replies-not drop # at ingress: node ports of the own node
//		ip daddr 10.0.0.1 accept
//		th sport vmap @ingress-udp-replies-ports # 1-52 : jump to-6f1d…, …
//		drop
//	}
//
// These chains are the same for every policy, but for node ports: what differs is in the maps and in what they lead to, which never changes (see peers).
func (e *emission) direction(d direction) {
	rs := e.rules
	accept := nftables.ChainPolicyAccept
	base := Chain{Chain: &nftables.Chain{Name: d.name, Table: rs.Table, Type: nftables.ChainTypeFilter, Hooknum: d.hook,
		Priority: nftables.ChainPriorityFilter, Policy: &accept}}
	var judging []Chain
	for _, proto := range []struct {
		verdict.Protocol
		numbers []byte
	}{{verdict.UDP, []byte{unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE}}, {verdict.SCTP, []byte{unix.IPPROTO_SCTP}}} {
		suffix := "-" + strings.ToLower(proto.String())
		name := d.name + suffix
		for _, number := range proto.numbers {
			base.Rules = append(base.Rules, rule(meta(expr.MetaKeyL4PROTO, []byte{number}), goTo(name)))
		}

		first := rs.chain(name)
		first.Rules = append(first.Rules, rule(meta(d.iface, interfaceName("lo")), done(expr.VerdictAccept)), rule(reply(), goTo(d.replies+suffix+repliesSuffix)))
		back := rs.chain(name + repliesSuffix)
		if d.mark != 0 {
			mark := binaryutil.NativeEndian.PutUint32(d.mark)
			first.Rules = append(first.Rules, rule(meta(expr.MetaKeyMARK, mark), markFlow(), done(expr.VerdictAccept)))
			back.Rules = append(back.Rules, rule(flowMark(), equals(mark), done(expr.VerdictAccept)))
		}
		rs.refuseNodePorts(&back, d, proto.Protocol)
		var ranges []portPeers
		for i := range d.blocks {
			b := &d.blocks[i]
			if b.Protocol != proto.Protocol {
				continue
			}
			peers := e.peers(b.Peers)
			for _, r := range b.Ports {
				ranges = append(ranges, portPeers{r, peers})
			}
		}
		slices.SortFunc(ranges, func(a, b portPeers) int { return cmp.Compare(a.First, b.First) })
		rs.judge(&first, d.begins, d.accepted, ranges)
		rs.judge(&back, d.answers, d.accepted, ranges)
		judging = append(judging, first, back)
	}
	rs.Chains = append(append(rs.Chains, base), judging...)
}

// refuseNodePorts drops replies to node ports of the own node. Nobody but the node sends from there, and it does so for no flow that it begins; but whoever
// can forge its address could begin one for a confined app, which would reach what is behind the node port by answering.
func (rs *Ruleset) refuseNodePorts(c *Chain, d direction, proto verdict.Protocol) {
	var ports []uint16
	for i := range d.services {
		if s := &d.services[i]; s.Protocol == proto && slices.Contains(d.accepted, s.Addr.Addr()) {
			ports = append(ports, s.Addr.Port())
		}
	}
	if len(ports) == 0 {
		return
	}
	slices.Sort(ports)
	not := Set{Set: &nftables.Set{Table: rs.Table, Name: c.Name + "-not", Interval: true, KeyType: nftables.TypeInetService, KeyByteOrder: binaryutil.BigEndian}}
	for _, port := range slices.Compact(ports) {
		not.Elements = append(not.Elements, nftables.SetElement{Key: binary.BigEndian.AppendUint16(nil, port)})
		if port < 65535 {
			not.Elements = append(not.Elements, nftables.SetElement{Key: binary.BigEndian.AppendUint16(nil, port+1), IntervalEnd: true})
		}
	}
	rs.add(&not)
	for _, a := range d.accepted {
		c.Rules = append(c.Rules, rule(d.answers.address(a.Is4()), equals(a.AsSlice()), sides{port: destinationPort}.portLoaded(), lookup(not.Set), done(expr.VerdictDrop)))
	}
}

// repliesSuffix is that of chains which judge replies.
const repliesSuffix = "-replies"

// judge ends a chain: peers that are accepted always pass, ports lead to the chain of their peers, the rest is dropped.
func (rs *Ruleset) judge(c *Chain, at sides, accepted []netip.Addr, ranges []portPeers) {
	for _, a := range accepted {
		c.Rules = append(c.Rules, rule(at.address(a.Is4()), equals(a.AsSlice()), done(expr.VerdictAccept)))
	}
	ports := Set{Set: &nftables.Set{Table: rs.Table, Name: c.Name + "-ports", Interval: true, IsMap: true,
		KeyType: nftables.TypeInetService, DataType: nftables.TypeVerdict, KeyByteOrder: binaryutil.BigEndian}}
	ports.Elements = portElements(ranges, at.name)
	rs.add(&ports)
	c.Rules = append(c.Rules, rule(at.portLoaded(), lookup(ports.Set)), rule(done(expr.VerdictDrop)))
}

// peers adds the chains that accept the peers of a block, on the way to the pod and from it, unless they are there already, and returns the name that
// both, and their sets, have in common:
//
//	chain from-6f1d… {
//		meta nfproto ipv4 ip saddr @peers-6f1d…-v4 accept
//		meta nfproto ipv6 accept                 # where every address of the family is allowed
//	}
//	chain to-6f1d… {
//		meta nfproto ipv4 ip daddr @peers-6f1d…-v4 accept
//		meta nfproto ipv6 accept
//	}
//
// The name stands for the peers: chains and sets of one name are the same in all policies. So a policy that comes after another may leave them
// where they are (see change), and a packet that is under way at the moment of a commit meets the old peers of its port or the new ones.
func (e *emission) peers(list []verdict.PacketPrefix) string {
	v4, v6 := flatten(list)
	name, made := e.named(fmt.Sprint(v4, v6))
	if made {
		return name
	}
	rs := e.rules
	from, to := peerSends(0), peerGets(0)
	in, out := rs.chain(from.name+name), rs.chain(to.name+name)
	for _, family := range []struct {
		intervals []interval
		v4        bool
		suffix    string
		key       nftables.SetDatatype
	}{{v4, true, "-v4", nftables.TypeIPAddr}, {v6, false, "-v6", nftables.TypeIP6Addr}} {
		switch list := family.intervals; {
		case len(list) == 0:
		case list[0].whole():
			in.Rules = append(in.Rules, rule(nfproto(family.v4), done(expr.VerdictAccept)))
			out.Rules = append(out.Rules, rule(nfproto(family.v4), done(expr.VerdictAccept)))
		default:
			s := Set{Set: &nftables.Set{Table: rs.Table, Name: peersPrefix + name + family.suffix, Interval: true, KeyType: family.key, KeyByteOrder: binaryutil.BigEndian},
				Elements: addressElements(list)}
			rs.add(&s)
			in.Rules = append(in.Rules, rule(from.address(family.v4), lookup(s.Set), done(expr.VerdictAccept)))
			out.Rules = append(out.Rules, rule(to.address(family.v4), lookup(s.Set), done(expr.VerdictAccept)))
		}
	}
	e.led = append(e.led, in, out)
	return name
}

// peersPrefix is that of the sets of peers.
const peersPrefix = "peers-"

// named is the name of what a text describes, the same wherever it is described so, and whether it has been asked for before.
func (e *emission) named(content string) (name string, before bool) {
	sum := sha256.Sum256([]byte(content))
	name = hex.EncodeToString(sum[:16])
	before = e.made[name]
	e.made[name] = true
	return name, before
}

func (rs *Ruleset) chain(name string) Chain {
	return Chain{Chain: &nftables.Chain{Name: name, Table: rs.Table}}
}

// add gives the set its ID within the transaction. Otherwise the library would, from a count that it does not lock.
func (rs *Ruleset) add(s *Set) {
	s.ID = uint32(len(rs.Sets) + 1)
	rs.Sets = append(rs.Sets, *s)
}

func addressElements(in []interval) []nftables.SetElement {
	out := make([]nftables.SetElement, 0, 2*len(in))
	for _, i := range in {
		out = append(out, nftables.SetElement{Key: i.first.AsSlice()})
		if next := i.last.Next(); next.IsValid() {
			out = append(out, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}

// portPeers says who is accepted at a range of ports.
type portPeers struct {
	verdict.PortRange
	peers string
}

// portElements are the elements for sorted ranges. Chains of peers return where they do not accept: also one that comes with a commit while a packet is
// on its way through the rules of before, for which that chain is still empty.
func portElements(ranges []portPeers, prefix string) []nftables.SetElement {
	var out []nftables.SetElement
	for _, r := range ranges {
		to := &expr.Verdict{Kind: expr.VerdictJump, Chain: prefix + r.peers}
		out = append(out, nftables.SetElement{Key: binary.BigEndian.AppendUint16(nil, r.First), VerdictData: to})
		if r.Last < 65535 {
			out = append(out, nftables.SetElement{Key: binary.BigEndian.AppendUint16(nil, r.Last+1), IntervalEnd: true})
		}
	}
	return out
}
