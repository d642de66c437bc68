package hold

import (
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
)

// direction is one in which peers outside the cluster are judged by their address alone.
type direction struct {
	name   string    // of the chain that looks at the port
	offset [2]uint32 // of the peer's address in the network header, by family
}

var (
	external = direction{"external", [2]uint32{families[0].to, families[1].to}}
	inbound  = direction{"inbound", [2]uint32{families[0].from, families[1].from}}
)

// ruling is whom a table admits without an identity on some ports.
type ruling struct {
	ports []verdict.PortRange
	spans [2][]span // the admitted addresses, by family
}

func (r ruling) equal(o ruling) bool {
	return slices.Equal(r.ports, o.ports) && slices.Equal(r.spans[0], o.spans[0]) && slices.Equal(r.spans[1], o.spans[1])
}

// rulings lists whom a table admits without an identity, over TCP. What none lists is refused. Interval sets know no longest prefix, so
// prefixes are flattened.
func rulings(t *verdict.Table) (list []ruling) {
	for _, b := range t.Blocks {
		if b.Protocol != verdict.TCP {
			continue
		}
		r := ruling{ports: b.Ports}
		for _, s := range flatten(b.Peers.Anonymous) {
			f := familyOf(s.first)
			r.spans[f] = append(r.spans[f], s)
		}
		if len(r.spans[0])+len(r.spans[1]) > 0 {
			list = append(list, r)
		}
	}
	return list
}

// size is how many intervals and ranges of ports the kernel gets.
func size(list []ruling) (n int) {
	for _, r := range list {
		n += len(r.ports) + len(r.spans[0]) + len(r.spans[1])
	}
	return n
}

// judging are the chains and sets of one direction: the first chain looks at the port, the others look at the address.
type judging struct {
	chains []netfilter.Chain
	sets   []addressSet
}

type addressSet struct {
	*nftables.Set
	elements []nftables.SetElement
}

// judge makes, in nft's own language:
//
//	chain external {
//		tcp dport 443 goto external-1-0
//		goto refuse
//	}
//	chain external-1-0 {
//		ip daddr @external-1-0-4 accept
//		meta nfproto ipv6 accept          # where every address of the family is admitted
//		goto refuse
//	}
//
// The generation keeps the names of two versions apart, so that the older one can stay until nothing leads there any more.
func (d direction) judge(list []ruling, generation int) judging {
	dispatch := d.dispatch()
	var blocks []netfilter.Chain
	var j judging
	for i, r := range list {
		block := netfilter.Chain{Chain: &nftables.Chain{Name: fmt.Sprintf("%s-%d-%d", d.name, generation, i), Table: table()}}
		for _, p := range r.ports {
			dispatch.Rules = append(dispatch.Rules, rule(toPorts(p), jump(block.Chain)))
		}
		for f, spans := range r.spans {
			switch {
			case len(spans) == 0:
			case spans[0].whole():
				block.Rules = append(block.Rules, rule(families[f].is(), decide(expr.VerdictAccept)))
			default:
				s := addressSet{&nftables.Set{Table: table(), Name: block.Name + "-" + families[f].name, ID: uint32(100 + len(j.sets)), Interval: true,
					KeyType: families[f].addrType, KeyByteOrder: binaryutil.BigEndian}, intervals(spans)}
				j.sets = append(j.sets, s)
				block.Rules = append(block.Rules, rule(families[f].is(), []expr.Any{
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: d.offset[f], Len: families[f].addrLen},
					&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID},
				}, decide(expr.VerdictAccept)))
			}
		}
		block.Rules = append(block.Rules, refuse())
		blocks = append(blocks, block)
	}
	dispatch.Rules = append(dispatch.Rules, refuse())
	j.chains = append([]netfilter.Chain{dispatch}, blocks...)
	return j
}

// pass lets everything go on to Envoy, who decides anyway.
func (d direction) pass() judging {
	c := d.dispatch()
	c.Rules = [][]expr.Any{decide(expr.VerdictAccept)}
	return judging{chains: []netfilter.Chain{c}}
}

func (d direction) dispatch() netfilter.Chain {
	return netfilter.Chain{Chain: &nftables.Chain{Name: d.name, Table: table()}}
}

// intervals are spans as an interval set has them: a first key and the key after the last, which the greatest address has none of.
func intervals(spans []span) []nftables.SetElement {
	out := make([]nftables.SetElement, 0, 2*len(spans))
	for _, s := range spans {
		out = append(out, nftables.SetElement{Key: s.first.AsSlice()})
		if next := s.last.Next(); next.IsValid() {
			out = append(out, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
		}
	}
	return out
}
