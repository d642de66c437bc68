package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/mantlet/mantlet/verdict"
)

// Packets resolves the verdicts of a pod ("namespace/name") on UDP and SCTP to the addresses that identities have now. It returns the
// zero value, which denies, if there is no such pod.
//
// An address is all that speaks for a peer here, so the pod that owns it counts as the peer, with whatever identity it has:
//
//   - ingress: pods with a sidecar are judged as that identity, their own egress policy included where the subject is isolated. Everybody
//     else is judged as plaintext is: at a permissive pod as the rules select them, at a strict one only where an ipBlock names an address
//     outside the pod network. A strict pod that no policy isolates hears pods with a sidecar, and nobody else.
//   - egress: the pod's own policy and, towards a pod without a sidecar, that pod's ingress policy too: nobody else enforces it. An address
//     of the pod network that no pod has is no pod's: ipBlocks admit it or nothing does. To know who is there could only add to what
//     it may receive, so that this opens nothing.
//
// Any pod that comes, goes or changes may change the value, not only those that change verdicts: that is the price of addresses.
func (x *Index) Packets(name string) verdict.Packets {
	p := x.pods[name]
	if p == nil {
		return verdict.Packets{}
	}
	x.bring(p.subject)
	return verdict.Packets{Self: sortedAddrs(p.ips), Node: sortedAddrs(p.hostIPs), Ingress: x.packetIngress(p), Egress: x.packetEgress(p)}
}

func sortedAddrs(as []netip.Addr) []netip.Addr {
	out := slices.Clone(as)
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

func (x *Index) packetIngress(p *pod) []verdict.PacketBlock {
	table, evaluator := &p.subject.verdicts.Ingress, p.subject.ingress
	peers := x.addressed(p, func(peer *pod) bool { return peer.sidecar })
	return packetBlocks([]*verdict.Table{table}, func(proto verdict.Protocol, port uint16) []verdict.PacketPrefix {
		decided := anonymousAt(table, proto, port)
		for _, peer := range peers {
			decided[host(peer.addr)] = evaluator.Admits(proto, port, verdict.Peer{ID: peer.pod.ident.id, Addr: peer.addr})
		}
		return sparse(decided)
	})
}

func (x *Index) packetEgress(p *pod) []verdict.PacketBlock {
	table, evaluator := &p.subject.verdicts.Egress, p.subject.egress
	peers := x.addressed(p, func(*pod) bool { return true })
	tables := []*verdict.Table{table}
	seen := map[*Subject]bool{}
	for _, peer := range peers {
		s := peer.pod.subject
		if peer.pod.sidecar || seen[s] {
			continue
		}
		seen[s] = true
		x.bring(s)
		tables = append(tables, &s.verdicts.Ingress)
	}
	return packetBlocks(tables, func(proto verdict.Protocol, port uint16) []verdict.PacketPrefix {
		decided := anonymousAt(table, proto, port)
		for _, peer := range peers {
			allow := evaluator.Admits(proto, port, verdict.Peer{ID: peer.pod.ident.id, Addr: peer.addr})
			if allow && !peer.pod.sidecar {
				allow = peer.pod.subject.ingress.Admits(proto, port, verdict.Peer{ID: p.ident.id, Addr: sourceAddr(p, peer.addr)})
			}
			decided[host(peer.addr)] = allow
		}
		return sparse(decided)
	})
}

// addressedPod is a pod by one of its addresses.
type addressedPod struct {
	pod  *pod
	addr netip.Addr
}

// addressed lists the addresses of the pods, but for p itself, that are wanted and of a family in which p has an address too.
func (x *Index) addressed(p *pod, wanted func(*pod) bool) []addressedPod {
	var out []addressedPod
	for _, peer := range x.pods {
		if peer == p || !wanted(peer) {
			continue
		}
		for _, a := range x.owned(peer) {
			if sourceAddr(p, a).IsValid() {
				out = append(out, addressedPod{peer, a})
			}
		}
	}
	slices.SortFunc(out, func(a, b addressedPod) int { return a.addr.Compare(b.addr) })
	return out
}

// anonymousAt is what a table says at a port of peers without an identity.
func anonymousAt(t *verdict.Table, proto verdict.Protocol, port uint16) map[netip.Prefix]bool {
	out := map[netip.Prefix]bool{}
	if i := blockAt(t, proto, port); i >= 0 {
		for _, p := range t.Blocks[i].Peers.Anonymous {
			out[p.Prefix] = p.Verdict.Allow
		}
	}
	return out
}

// blockAt is the index of the block that holds a port, or -1.
func blockAt(t *verdict.Table, proto verdict.Protocol, port uint16) int {
	return slices.IndexFunc(t.Blocks, func(b verdict.Block) bool {
		return b.Protocol == proto && slices.ContainsFunc(b.Ports, func(r verdict.PortRange) bool { return r.First <= port && port <= r.Last })
	})
}

// sparse sorts, and leaves out what a shorter prefix says already, or nothing says: denied.
func sparse(decided map[netip.Prefix]bool) []verdict.PacketPrefix {
	var out, within []verdict.PacketPrefix // within: those of out that hold the one looked at, shortest first
	all := make([]verdict.PacketPrefix, 0, len(decided))
	for p, allow := range decided {
		all = append(all, verdict.PacketPrefix{Prefix: p, Allow: allow})
	}
	slices.SortFunc(all, verdict.PacketPrefix.Compare)
	for _, p := range all {
		for len(within) > 0 && !within[len(within)-1].Prefix.Contains(p.Prefix.Addr()) {
			within = within[:len(within)-1]
		}
		if said := len(within) > 0 && within[len(within)-1].Allow; said != p.Allow {
			out, within = append(out, p), append(within, p)
		}
	}
	return out
}

// packetBlocks cuts the ports wherever a block of a table begins or ends, asks once for each combination of blocks, and puts together
// the ports with equal answers.
func packetBlocks(tables []*verdict.Table, at func(verdict.Protocol, uint16) []verdict.PacketPrefix) []verdict.PacketBlock {
	var sets []*portSet
	for _, t := range tables {
		for _, b := range t.Blocks { // a set for each, so that there is a cut where two touch
			s := &portSet{}
			s[b.Protocol] = b.Ports
			sets = append(sets, s)
		}
	}
	blocks := []verdict.PacketBlock{}
	for _, proto := range []verdict.Protocol{verdict.UDP, verdict.SCTP} {
		bySignature := map[string]int{} // index into blocks, or -1: nobody is admitted
		byPeers := map[string]int{}
		for _, piece := range pieces(sets, proto) {
			sig := signature(sets, proto, piece.First)
			i, seen := bySignature[sig]
			if !seen {
				i = -1
				if peers := at(proto, piece.First); len(peers) > 0 {
					key := keyOf(peers)
					var known bool
					if i, known = byPeers[key]; !known {
						i = len(blocks)
						byPeers[key] = i
						blocks = append(blocks, verdict.PacketBlock{Protocol: proto, Peers: peers})
					}
				}
				bySignature[sig] = i
			}
			if i >= 0 {
				blocks[i].Ports = normalize(append(blocks[i].Ports, piece))
			}
		}
	}
	return blocks
}

func keyOf(peers []verdict.PacketPrefix) string {
	var b strings.Builder
	for _, p := range peers {
		fmt.Fprintf(&b, "%s %t,", p.Prefix, p.Allow)
	}
	return b.String()
}
