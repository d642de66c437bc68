package policy

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/verdict"
)

// Packets resolves the verdicts of a pod ("namespace/name") on UDP and SCTP to the addresses that identities have now. It returns the
// zero value, which denies, if there is no such pod. The value is shared and must not be changed: pods on one node of which the packets say the same
// have the very same, as long as somebody holds it.
//
// An address is all that speaks for a peer here, so the pod that owns it counts as the peer, with whatever identity it has:
//
//   - ingress: pods with a sidecar are judged as that identity, their own egress policy included where the subject is isolated. Everybody
//     else is judged as plaintext is: at a permissive pod as the rules select them, at a strict one only where an ipBlock names an address
//     outside the pod network. A strict pod that no policy isolates hears pods with a sidecar, and nobody else.
//   - egress: the pod's own policy and, towards a pod without a sidecar, that pod's ingress policy too: nobody else enforces it. An address
//     of the pod network that no pod has is no pod's: ipBlocks admit it or nothing does. To know who is there could only add to what
//     it may receive, so that this opens nothing.
//   - services: egress speaks of endpoints, so that a datagram to a cluster IP has to be led to one, here, where policy is known. The pod is
//     told of the services of which it may use an endpoint, and of those endpoints only. A cluster IP itself is never allowed, whatever ipBlock
//     holds it: beyond the pod the node would choose the endpoint, and not by policy. At a node's address the same holds for node ports, all of
//     which the pod is told of, at its own node's for host ports, and for no other port.
//
// Any pod that comes, goes or changes may change the value, not only those that change verdicts: that is the price of addresses.
func (x *Index) Packets(name string) *verdict.Packets {
	p := x.pods[name]
	if p == nil {
		return &verdict.Packets{}
	}
	s := p.subject
	x.bring(s)
	alike := len(x.packets.restricting) == 0 // else they may look at the very address that p sends from, which its replicas do not share
	if s.packets == nil || alike && s.packets.egress == nil {
		s.packets = &packetPolicy{ingress: x.packetIngress(p)}
		if alike {
			s.packets.egress = x.packetEgress(p)
		}
		x.packets.note(s)
	}
	in, eg := s.packets.ingress, s.packets.egress
	if !alike {
		eg = x.packetEgress(p)
	}
	return x.packets.share(in, eg, &verdict.Packets{Node: sortedAddrs(p.hostIPs), Ingress: in.blocks, Egress: eg.blocks, Services: x.packetServices(p)})
}

// packetServices are the services of which a pod may use an endpoint.
func (x *Index) packetServices(p *pod) []verdict.PacketService {
	var out []verdict.PacketService
	if len(x.packets.serving) == 0 && !x.hosts.servesPackets(p.node) {
		return nil
	}
	for _, proto := range []verdict.Protocol{verdict.UDP, verdict.SCTP} {
		for _, sp := range x.ServicePorts(p.key, proto) {
			if len(sp.Endpoints) > 0 || sp.External { // else what has the address would be reached
				out = append(out, verdict.PacketService{Protocol: proto, Addr: sp.Addr, Endpoints: sp.Endpoints})
			}
		}
	}
	return out
}

// closeServices denies cluster IPs, among what is decided of addresses that are no pod's.
func (x *Index) closeServices(decided map[netip.Prefix]bool) {
	closed := slices.Clone(x.serviceNet)
	for _, outside := range x.packets.serving {
		for _, a := range outside {
			closed = append(closed, host(a))
		}
	}
	for _, n := range closed {
		for p := range decided {
			if n.Bits() <= p.Bits() && n.Contains(p.Addr()) {
				delete(decided, p)
			}
		}
	}
	for _, n := range closed {
		decided[n.Masked()] = false
	}
}

// packetPolicy is a subject's packets, as long as they are true. It is made as they are asked for.
type packetPolicy struct {
	ingress, egress *packetSide // egress is nil where each pod has its own
}

func sortedAddrs(as []netip.Addr) []netip.Addr {
	out := slices.Clone(as)
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}

// ingressBlocks rests on nothing of a pod but what is in a packetQuestion.
func (x *Index) ingressBlocks(p *pod) []verdict.PacketBlock {
	table, evaluator := &p.subject.verdicts.Ingress, p.subject.ingress()
	peers := x.addressed(p, x.named(table))
	return packetBlocks([]*verdict.Table{table}, func(proto verdict.Protocol, port uint16) []verdict.PacketPrefix {
		decided := anonymousAt(table, proto, port)
		for _, peer := range peers {
			if peer.pod.sidecar {
				decided[host(peer.addr)] = evaluator.Admits(proto, port, verdict.Peer{ID: peer.pod.ident.id, Addr: peer.addr})
			}
		}
		return sparse(decided)
	})
}

func (x *Index) packetEgress(p *pod) *packetSide { return x.packets.side(x.egressBlocks(p)) }

func (x *Index) egressBlocks(p *pod) []verdict.PacketBlock {
	table, evaluator := &p.subject.verdicts.Egress, p.subject.egress()
	pods := x.named(table)
	if admitsPackets(table) { // else who is not named is denied anyway
		for name := range x.packets.restricting {
			pods[x.pods[name]] = true
		}
	}
	peers := x.addressed(p, pods)
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
		x.closeServices(decided)
		for _, peer := range peers {
			allow := evaluator.Admits(proto, port, verdict.Peer{ID: peer.pod.ident.id, Addr: peer.addr})
			if allow && !peer.pod.sidecar && peer.pod != p {
				allow = peer.pod.subject.ingress().Admits(proto, port, verdict.Peer{ID: p.ident.id, Addr: sourceAddr(p, peer.addr)})
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

// addressed lists the addresses of pods that are of a family in which p has an address too. That p itself may be among them does no harm,
// and makes its packets those of its replicas.
func (x *Index) addressed(p *pod, pods map[*pod]bool) []addressedPod {
	var out []addressedPod
	for peer := range pods {
		for _, a := range x.owned(peer) {
			x.packets.addressed++
			if sourceAddr(p, a).IsValid() {
				out = append(out, addressedPod{peer, a})
			}
		}
	}
	slices.SortFunc(out, func(a, b addressedPod) int { return a.addr.Compare(b.addr) })
	return out
}

// named collects the pods of which a table may say something else than of an address that is nobody's.
func (x *Index) named(t *verdict.Table) map[*pod]bool {
	out := map[*pod]bool{}
	ids, everyone := packetIdentities(t)
	if everyone {
		for _, p := range x.pods {
			out[p] = true
		}
		return out
	}
	for _, id := range ids {
		if i := x.identities[id]; i != nil {
			for _, p := range i.pods {
				out[p] = true
			}
		}
	}
	return out
}

// packetIdentities lists the identities that a table's blocks of UDP and SCTP speak of by name. everyone says that the others, too, are not
// decided as an address that is nobody's.
func packetIdentities(t *verdict.Table) (ids []spiffeid.ID, everyone bool) {
	for i := range t.Blocks {
		b := &t.Blocks[i]
		if b.Protocol == verdict.TCP {
			continue
		}
		for _, e := range b.Peers.ByIdentity {
			ids = append(ids, e.ID)
		}
		everyone = everyone || !slices.EqualFunc(b.Peers.Identified, b.Peers.Anonymous, func(p, q verdict.Prefix) bool {
			return p.Prefix == q.Prefix && p.Verdict.Allow == q.Verdict.Allow
		})
	}
	return ids, everyone
}

// admitsPackets reports whether a table's blocks of UDP and SCTP admit any address, whoever is there.
func admitsPackets(t *verdict.Table) bool {
	allows := func(p verdict.Prefix) bool { return p.Verdict.Allow }
	return slices.ContainsFunc(t.Blocks, func(b verdict.Block) bool {
		return b.Protocol != verdict.TCP && (slices.ContainsFunc(b.Peers.Identified, allows) || slices.ContainsFunc(b.Peers.Anonymous, allows))
	})
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
	b := make([]byte, 0, 18*len(peers))
	for _, p := range peers {
		b = append(b, p.Prefix.Addr().AsSlice()...)
		b = append(b, byte(p.Prefix.Addr().BitLen()), byte(p.Prefix.Bits()))
		b = strconv.AppendBool(b, p.Allow)
	}
	return string(b)
}
