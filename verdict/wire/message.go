package wire

import (
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/verdict"
)

// Message returns verdicts as the message that stands for them. It takes what a compiler made, in order and whole; that is checked
// where it is read.
func Message(v *verdict.Verdicts) *mantletv1.Verdicts {
	ids := identities(v)
	m := &mantletv1.Verdicts{Subject: v.Subject.String(), Mode: mantletv1.Mode(v.Mode)}
	index := make(map[spiffeid.ID]uint32, len(ids))
	for i, id := range ids {
		m.Identities = append(m.Identities, id.String())
		index[id] = uint32(i)
	}
	m.Ingress, m.Egress = table(&v.Ingress, index), table(&v.Egress, index)
	return m
}

// identities lists every identity that the tables speak of, once and sorted.
func identities(v *verdict.Verdicts) []spiffeid.ID {
	seen := map[spiffeid.ID]bool{}
	var ids []spiffeid.ID
	for _, t := range []*verdict.Table{&v.Ingress, &v.Egress} {
		for i := range t.Blocks {
			for _, e := range t.Blocks[i].Peers.ByIdentity {
				if !seen[e.ID] {
					seen[e.ID] = true
					ids = append(ids, e.ID)
				}
			}
		}
	}
	slices.SortFunc(ids, func(a, b spiffeid.ID) int { return strings.Compare(a.String(), b.String()) })
	return ids
}

func table(t *verdict.Table, index map[spiffeid.ID]uint32) *mantletv1.Table {
	m := &mantletv1.Table{Isolating: t.Isolating}
	for _, r := range t.Rules {
		m.Rules = append(m.Rules, &mantletv1.Rule{Policy: r.Policy, Rule: r.Rule, Peers: r.Peers, Ports: r.Ports})
	}
	for _, r := range t.Reasons {
		m.Reasons = append(m.Reasons, &mantletv1.Reason{Policy: r.Policy, Rule: r.Rule, Text: r.Text, Nearest: r.Nearest})
	}
	for i := range t.Blocks {
		m.Blocks = append(m.Blocks, block(&t.Blocks[i], index))
	}
	return m
}

func block(b *verdict.Block, index map[spiffeid.ID]uint32) *mantletv1.Block {
	m := &mantletv1.Block{
		Protocol:   mantletv1.Protocol(b.Protocol),
		Identified: prefixes(b.Peers.Identified),
		Anonymous:  prefixes(b.Peers.Anonymous),
	}
	for _, r := range b.Ports {
		m.Ports = append(m.Ports, &mantletv1.PortRange{First: uint32(r.First), Last: uint32(r.Last)})
	}
	for _, e := range b.Peers.ByIdentity {
		m.ByIdentity = append(m.ByIdentity, &mantletv1.IdentityVerdict{
			Id: index[e.ID], Allow: e.Verdict.Allow, Reason: uint32(e.Verdict.Reason), Addresses: prefixes(e.Addresses),
		})
	}
	return m
}

func prefixes(ps []verdict.Prefix) []*mantletv1.PrefixVerdict {
	var out []*mantletv1.PrefixVerdict
	for _, p := range ps {
		out = append(out, &mantletv1.PrefixVerdict{
			Address: p.Prefix.Addr().AsSlice(), Bits: uint32(p.Prefix.Bits()), Allow: p.Verdict.Allow, Reason: uint32(p.Verdict.Reason),
		})
	}
	return out
}
