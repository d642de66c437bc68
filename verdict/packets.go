package verdict

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Packets are the decisions on UDP and SCTP of one pod, all by address: Envoy cannot authenticate these protocols, so that the control
// plane has looked up which addresses the identities have now.
//
//	Verdicts + addresses of pods ──policy.Index.Packets──► Packets ──agent──► nftables in the pod's network namespace
//
// The pod always reaches its own node, and the node reaches the pod. Beside that, what is not listed is denied: the zero value lets
// nothing else through. What a pod sends to itself never leaves it and is nobody's to decide; so the value holds nothing that is one pod's
// alone, and replicas on one node share it.
type Packets struct {
	// Node are the addresses of the pod's own node, sorted.
	Node []netip.Addr `json:"node,omitempty"`
	// Ingress decides by the source address and the pod's port, Egress by the destination's address and port. Blocks are disjoint in
	// (protocol, port) and sorted by protocol and first port.
	Ingress []PacketBlock `json:"ingress"`
	Egress  []PacketBlock `json:"egress"`
	// Services are those that the pod may use, and all that are to be had at nodes' and external addresses, host ports of the own node among them, sorted by protocol, address and port. What the pod sends
	// to one of them goes to an endpoint, and Egress decides on that; what it sends to any other cluster IP stays what it is, and Egress denies it.
	Services []PacketService `json:"services,omitempty"`
}

// PacketBlock holds the peers of a group of ports that have the same peers.
type PacketBlock struct {
	Protocol Protocol    `json:"protocol"` // UDP or SCTP
	Ports    []PortRange `json:"ports"`    // sorted, apart from each other, never empty
	// Peers is sorted by address, then length; the longest prefix that holds the peer's address decides, and what none holds is denied.
	Peers []PacketPrefix `json:"peers"`
}

// PacketPrefix is the decision on a range of addresses. The prefix is masked and never an IPv4-mapped one.
type PacketPrefix struct {
	Prefix netip.Prefix `json:"prefix"`
	Allow  bool         `json:"allow,omitempty"`
}

// PacketService says where what the pod sends to a port of a cluster IP or of an external address of a service, or to a node port, goes.
type PacketService struct {
	Protocol Protocol       `json:"protocol"` // UDP or SCTP
	Addr     netip.AddrPort `json:"addr"`
	// Endpoints are those that the policies of both ends admit: sorted, of the family of Addr. Each flow goes to one of them, at random; where a
	// client is to stay with one there is only that one. Without any what the pod sends there is refused.
	Endpoints []netip.AddrPort `json:"endpoints"`
}

// Compare orders by protocol, then by address and port.
func (s *PacketService) Compare(o *PacketService) int {
	return cmp.Or(cmp.Compare(s.Protocol, o.Protocol), s.Addr.Compare(o.Addr))
}

// Service is the service at an address and port, or nil.
func (p *Packets) Service(proto Protocol, to netip.AddrPort) *PacketService {
	to = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	i, found := slices.BinarySearchFunc(p.Services, &PacketService{Protocol: proto, Addr: to}, func(s PacketService, o *PacketService) int { return s.Compare(o) })
	if !found {
		return nil
	}
	return &p.Services[i]
}

// Compare orders by address, then by length: a prefix comes before those inside it.
func (p PacketPrefix) Compare(q PacketPrefix) int {
	return cmp.Or(p.Prefix.Addr().Compare(q.Prefix.Addr()), cmp.Compare(p.Prefix.Bits(), q.Prefix.Bits()))
}

// Hash is a content hash of the whole value: 64 hexadecimal digits.
func (p *Packets) Hash() string {
	b, err := json.Marshal(p)
	if err != nil { // plain data: every field has a total text form
		panic(fmt.Sprintf("verdict: marshal packets: %v", err))
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// AllowsIngress says whether a peer may send to a port of the pod.
func (p *Packets) AllowsIngress(proto Protocol, port uint16, from netip.Addr) bool {
	return p.allows(p.Ingress, proto, port, from.Unmap())
}

// AllowsEgress says whether the pod may send to a port of a peer.
func (p *Packets) AllowsEgress(proto Protocol, port uint16, to netip.Addr) bool {
	return p.allows(p.Egress, proto, port, to.Unmap())
}

// allows looks through everything, so that one sees at a glance that it is right; whoever has many packets to judge makes something
// faster of the value first.
func (p *Packets) allows(blocks []PacketBlock, proto Protocol, port uint16, peer netip.Addr) bool {
	if slices.Contains(p.Node, peer) {
		return true
	}
	for i := range blocks {
		b := &blocks[i]
		if b.Protocol != proto || !covers(b.Ports, port) {
			continue
		}
		longest, allow := -1, false
		for _, q := range b.Peers {
			if q.Prefix.Bits() > longest && q.Prefix.Contains(peer) {
				longest, allow = q.Prefix.Bits(), q.Allow
			}
		}
		return allow
	}
	return false
}

// Validate fails where the value is not what its comments promise: then it is better not applied than guessed at.
func (p *Packets) Validate() error {
	for _, a := range p.Node {
		if !ordinary(a) {
			return fmt.Errorf("packets: address %q is not one of a node", a)
		}
	}
	if err := validate(p.Ingress); err != nil {
		return fmt.Errorf("packets: ingress: %w", err)
	}
	if err := validate(p.Egress); err != nil {
		return fmt.Errorf("packets: egress: %w", err)
	}
	for i := range p.Services {
		if err := p.Services[i].validate(); err != nil {
			return fmt.Errorf("packets: service %s: %w", p.Services[i].Addr, err)
		}
		if i > 0 && p.Services[i-1].Compare(&p.Services[i]) >= 0 {
			return fmt.Errorf("packets: service %s: is not in order, or twice", p.Services[i].Addr)
		}
	}
	return nil
}

// ordinary reports whether an address can be that of a pod, a node or a service.
func ordinary(a netip.Addr) bool {
	return a.IsValid() && !a.Is4In6() && a.Zone() == "" && !a.IsUnspecified() && !a.IsMulticast()
}

func (s *PacketService) validate() error {
	switch {
	case s.Protocol != UDP && s.Protocol != SCTP:
		return fmt.Errorf("%s is not decided by address", s.Protocol)
	case !ordinary(s.Addr.Addr()) || s.Addr.Port() == 0:
		return errors.New("is no address with a port")
	}
	for i, e := range s.Endpoints {
		switch {
		case !ordinary(e.Addr()) || e.Port() == 0 || e.Addr().Is4() != s.Addr.Addr().Is4():
			return fmt.Errorf("endpoint %s is no address of its family with a port", e)
		case i > 0 && s.Endpoints[i-1].Compare(e) >= 0:
			return fmt.Errorf("endpoint %s is not in order, or twice", e)
		}
	}
	return nil
}

func validate(blocks []PacketBlock) error {
	var ports [SCTP + 1][]PortRange
	for i := range blocks {
		b := &blocks[i]
		if b.Protocol != UDP && b.Protocol != SCTP {
			return fmt.Errorf("block %d: %s is not decided by address", i, b.Protocol)
		}
		if len(b.Ports) == 0 {
			return fmt.Errorf("block %d: no ports", i)
		}
		for _, r := range b.Ports {
			if r.First == 0 || r.Last < r.First {
				return fmt.Errorf("block %d: ports %s are no range", i, r)
			}
		}
		ports[b.Protocol] = append(ports[b.Protocol], b.Ports...)
		for j, q := range b.Peers {
			switch {
			case !q.Prefix.IsValid() || q.Prefix.Addr().Is4In6() || q.Prefix.Masked() != q.Prefix:
				return fmt.Errorf("block %d: %q is not a masked prefix", i, q.Prefix)
			case j > 0 && b.Peers[j-1].Compare(q) >= 0:
				return fmt.Errorf("block %d: %s is not in order, or twice", i, q.Prefix)
			}
		}
	}
	for _, rs := range ports {
		slices.SortFunc(rs, func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
		for i := 1; i < len(rs); i++ {
			if rs[i].First <= rs[i-1].Last {
				return errors.New("port " + PortRange{rs[i].First, rs[i].First}.String() + " is in two blocks")
			}
		}
	}
	return nil
}

// Admits is Decide without the reason: a map look-up and at most one of an address.
func (e *Evaluator) Admits(proto Protocol, port uint16, peer Peer) bool {
	peer.Addr = peer.Addr.Unmap()
	v, listed := e.lookup(proto, port, peer)
	return listed && v.Allow
}
