package packet

import (
	"cmp"
	"encoding/binary"
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
	hook     *nftables.ChainHook
	iface    expr.MetaKey
	v4, v6   uint32 // offset of the peer's address in the IP header
	blocks   []verdict.PacketBlock
	accepted []netip.Addr // always
	mark     uint32       // accepted always; zero: none
}

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
	rs.direction(direction{name: "ingress", hook: nftables.ChainHookPrerouting, iface: expr.MetaKeyIIFNAME, v4: 12, v6: 8,
		blocks: p.Ingress, accepted: p.Node})
	rs.direction(direction{name: "egress", hook: nftables.ChainHookPostrouting, iface: expr.MetaKeyOIFNAME, v4: 16, v6: 24,
		blocks: p.Egress, accepted: p.Node, mark: mark})
	rs.services(p.Services, mark)
	return rs, nil
}

// direction adds, in nft's own language and for each protocol:
//
//	chain ingress { type filter hook prerouting priority 0; policy accept;
//		meta l4proto udp goto ingress-udp
//	}
//	chain ingress-udp {
//		iifname "lo" accept
//		ct state established accept
//		meta mark 0x6d74 ct mark set meta mark accept # at egress: the agent's own
//		ip saddr 10.0.0.1 accept                 # own node
//		th dport vmap @ingress-udp-ports         # 1-52 : goto ingress-udp-0, …
//		drop
//	}
//	chain ingress-udp-0 {
//		meta nfproto ipv4 ip saddr @ingress-udp-0-v4 accept
//		meta nfproto ipv6 accept                 # where every address of the family is allowed
//		drop
//	}
func (rs *Ruleset) direction(d direction) {
	accept := nftables.ChainPolicyAccept
	base := Chain{Chain: &nftables.Chain{Name: d.name, Table: rs.Table, Type: nftables.ChainTypeFilter, Hooknum: d.hook,
		Priority: nftables.ChainPriorityFilter, Policy: &accept}}
	var judging []Chain
	for _, proto := range []struct {
		verdict.Protocol
		number byte
	}{{verdict.UDP, unix.IPPROTO_UDP}, {verdict.SCTP, unix.IPPROTO_SCTP}} {
		name := d.name + "-" + strings.ToLower(proto.String())
		base.Rules = append(base.Rules, rule(meta(expr.MetaKeyL4PROTO, []byte{proto.number}), jump(name)))

		judge := rs.chain(name)
		judge.Rules = append(judge.Rules, rule(meta(d.iface, interfaceName("lo")), done(expr.VerdictAccept)), rule(established(), done(expr.VerdictAccept)))
		if d.mark != 0 {
			judge.Rules = append(judge.Rules, rule(meta(expr.MetaKeyMARK, binaryutil.NativeEndian.PutUint32(d.mark)), markFlow(), done(expr.VerdictAccept)))
		}
		for _, a := range d.accepted {
			judge.Rules = append(judge.Rules, rule(d.address(a.Is4()), equals(a.AsSlice()), done(expr.VerdictAccept)))
		}
		ports := Set{Set: &nftables.Set{Table: rs.Table, Name: name + "-ports", Interval: true, IsMap: true,
			KeyType: nftables.TypeInetService, DataType: nftables.TypeVerdict, KeyByteOrder: binaryutil.BigEndian}}
		var blocks []Chain
		var ranges []portGoto
		for i := range d.blocks {
			b := &d.blocks[i]
			if b.Protocol != proto.Protocol {
				continue
			}
			block := rs.block(d, fmt.Sprintf("%s-%d", name, len(blocks)), b.Peers)
			blocks = append(blocks, block)
			for _, r := range b.Ports {
				ranges = append(ranges, portGoto{r, block.Name})
			}
		}
		if len(ranges) > 0 {
			ports.Elements = portElements(ranges)
			rs.add(&ports)
			judge.Rules = append(judge.Rules, rule(destinationPort(), lookup(ports.Set)))
		}
		judge.Rules = append(judge.Rules, rule(done(expr.VerdictDrop)))
		judging = append(append(judging, judge), blocks...)
	}
	rs.Chains = append(append(rs.Chains, base), judging...)
}

// block makes the chain that accepts the peers of a block and drops the rest.
func (rs *Ruleset) block(d direction, name string, peers []verdict.PacketPrefix) Chain {
	c := rs.chain(name)
	v4, v6 := flatten(peers)
	for _, family := range []struct {
		intervals []interval
		v4        bool
		suffix    string
		key       nftables.SetDatatype
	}{{v4, true, "-v4", nftables.TypeIPAddr}, {v6, false, "-v6", nftables.TypeIP6Addr}} {
		switch in := family.intervals; {
		case len(in) == 0:
		case in[0].whole():
			c.Rules = append(c.Rules, rule(nfproto(family.v4), done(expr.VerdictAccept)))
		default:
			s := Set{Set: &nftables.Set{Table: rs.Table, Name: name + family.suffix, Interval: true, KeyType: family.key, KeyByteOrder: binaryutil.BigEndian},
				Elements: addressElements(in)}
			rs.add(&s)
			c.Rules = append(c.Rules, rule(d.address(family.v4), lookup(s.Set), done(expr.VerdictAccept)))
		}
	}
	c.Rules = append(c.Rules, rule(done(expr.VerdictDrop)))
	return c
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

// portGoto says which chain judges a range of ports.
type portGoto struct {
	verdict.PortRange
	chain string
}

func portElements(ranges []portGoto) []nftables.SetElement {
	slices.SortFunc(ranges, func(a, b portGoto) int { return cmp.Compare(a.First, b.First) })
	var out []nftables.SetElement
	for _, r := range ranges {
		out = append(out, nftables.SetElement{Key: binary.BigEndian.AppendUint16(nil, r.First), VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: r.chain}})
		if r.Last < 65535 {
			out = append(out, nftables.SetElement{Key: binary.BigEndian.AppendUint16(nil, r.Last+1), IntervalEnd: true})
		}
	}
	return out
}
