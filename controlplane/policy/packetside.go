package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"
	"weak"

	"github.com/mantlet/mantlet/verdict"
)

// packetSide is one direction of packets. What is the same is one value, whoever's it is: a list of all pods with a sidecar would otherwise be there,
// compared and written down once for each of them.
type packetSide struct {
	blocks []verdict.PacketBlock
	sum    digest // of blocks
}

type digest [sha256.Size]byte

// interned holds one value of each content, as long as somebody uses it.
type interned[K comparable, V any] struct {
	values map[K]weak.Pointer[V]
	sweep  int // how many there may be before those that nobody uses are taken out
}

// fewInterned is how many values are kept without looking whether somebody uses them.
const fewInterned = 64

// get returns the value of a content, made if there is none.
func (i *interned[K, V]) get(key K, made func() *V) *V {
	if v := i.values[key].Value(); v != nil {
		return v
	}
	if i.values == nil {
		i.values = map[K]weak.Pointer[V]{}
	}
	if len(i.values) >= max(i.sweep, fewInterned) {
		for k, p := range i.values {
			if p.Value() == nil {
				delete(i.values, k)
			}
		}
		i.sweep = 2 * len(i.values)
	}
	v := made()
	i.values[key] = weak.Make(v)
	return v
}

// side is the one value with these blocks.
func (n *packetIndex) side(blocks []verdict.PacketBlock) *packetSide {
	sum := sumOf(blocks)
	return n.sides.get(sum, func() *packetSide { return &packetSide{blocks, sum} })
}

// sumOf writes blocks down so that no two different ones are written alike: each list after its length.
func sumOf(blocks []verdict.PacketBlock) digest {
	h, b := sha256.New(), make([]byte, 0, 4096)
	for i := range blocks {
		blk := &blocks[i]
		b = appendPorts(append(b, byte(blk.Protocol)), blk.Ports)
		b = binary.AppendUvarint(b, uint64(len(blk.Peers)))
		for _, p := range blk.Peers {
			if len(b) > 4000 {
				h.Write(b) // never fails (hash.Hash)
				b = b[:0]
			}
			b = appendDecision(b, p.Prefix, p.Allow)
		}
	}
	h.Write(b)
	return digest(h.Sum(nil))
}

func appendPorts(b []byte, ports []verdict.PortRange) []byte {
	b = binary.AppendUvarint(b, uint64(len(ports)))
	for _, r := range ports {
		b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, r.First), r.Last)
	}
	return b
}

func appendDecision(b []byte, p netip.Prefix, allow bool) []byte {
	b = append(b, byte(p.Addr().BitLen()), byte(p.Bits()))
	b = append(b, p.Addr().AsSlice()...)
	if allow {
		return append(b, 1)
	}
	return append(b, 0)
}

// packetQuestion is all that packets of ingress rest on beside the pods that there are.
type packetQuestion struct {
	table    digest // what it decides on UDP and SCTP
	families [2]bool
}

// packetIngress is what a pod hears. Subjects of which the tables decide alike get the very same: it is worked out for one of them after each change.
func (x *Index) packetIngress(p *pod) *packetSide {
	table := &p.subject.verdicts.Ingress
	q := packetQuestion{table: decisionsOf(table)}
	for _, a := range p.ips {
		q.families[family(a)] = true
	}
	if is := x.packets.ingress[q]; is != nil {
		return is
	}
	is := x.packets.side(x.ingressBlocks(p))
	x.packets.ingress[q] = is
	return is
}

// decisionsOf writes down what a table decides on UDP and SCTP, and not why.
func decisionsOf(t *verdict.Table) digest {
	h, b := sha256.New(), make([]byte, 0, 4096)
	prefixes := func(list []verdict.Prefix) {
		b = binary.AppendUvarint(b, uint64(len(list)))
		for _, p := range list {
			b = appendDecision(b, p.Prefix, p.Verdict.Allow)
		}
	}
	for i := range t.Blocks {
		blk := &t.Blocks[i]
		if blk.Protocol == verdict.TCP {
			continue
		}
		b = appendPorts(append(b, byte(blk.Protocol)), blk.Ports)
		b = binary.AppendUvarint(b, uint64(len(blk.Peers.ByIdentity)))
		for j := range blk.Peers.ByIdentity {
			id := &blk.Peers.ByIdentity[j]
			b = binary.AppendUvarint(b, uint64(len(id.ID.String())))
			b = append(b, id.ID.String()...)
			prefixes(id.Addresses)
			b = appendDecision(b, netip.Prefix{}, id.Verdict.Allow)
			if len(b) > 4000 {
				h.Write(b) // never fails (hash.Hash)
				b = b[:0]
			}
		}
		prefixes(blk.Peers.Identified)
		prefixes(blk.Peers.Anonymous)
	}
	h.Write(b)
	return digest(h.Sum(nil))
}

// sharing is what packets are of which one value serves several pods.
type sharing struct {
	ingress, egress digest
	rest            string // the node's addresses, services
}

// share returns the one value that says what v says.
func (n *packetIndex) share(in, out *packetSide, v *verdict.Packets) *verdict.Packets {
	key := make([]byte, 0, 128)
	for _, a := range v.Node {
		key = append(a.AppendTo(key), ' ')
	}
	for i := range v.Services {
		s := &v.Services[i]
		key = s.Addr.AppendTo(append(key, '\n', byte(s.Protocol)))
		for _, e := range s.Endpoints {
			key = e.AppendTo(append(key, ' '))
		}
	}
	return n.values.get(sharing{in.sum, out.sum, string(key)}, func() *verdict.Packets { return v })
}
