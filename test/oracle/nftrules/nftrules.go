// Package nftrules interprets nftables rules as they are sent to the kernel, packet by packet. It knows the expressions that the packet
// policy uses, and fails for any other: what it does not understand it does not judge.
//
//	packet.Emit ──► Ruleset ──► Judge(hook, Packet) ──► accepted or dropped, held against the oracle
package nftrules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter/packet"
)

// Packet is as much of a packet as rules can see.
type Packet struct {
	Protocol         byte // unix.IPPROTO_UDP, …
	Source, Dest     netip.Addr
	SourcePort, Port uint16
	In, Out          string // interface names
	Mark             uint32 // of the socket
	Flow             Flow
}

// Flow is what conntrack knows of the flow that a packet belongs to.
type Flow struct {
	Direction Direction
	Mark      uint32
}

// Direction is that of a packet in its flow.
type Direction uint8

// Directions.
const (
	Original  Direction = iota // as the flow's first
	Reply                      // back
	Untracked                  // conntrack knows no flow
)

// Judge says whether the base chain of a hook accepts a packet.
func Judge(rs *packet.Ruleset, hook *nftables.ChainHook, p Packet) (bool, error) {
	m := machine{rs: rs, packet: p, network: p.network(), transport: p.transport()}
	for i := range rs.Chains {
		c := &rs.Chains[i]
		if c.Hooknum == nil || *c.Hooknum != *hook {
			continue
		}
		kind, err := m.chain(c, 0)
		if err != nil {
			return false, fmt.Errorf("chain %s: %w", c.Name, err)
		}
		switch {
		case kind == expr.VerdictDrop || kind == expr.VerdictContinue && *c.Policy == nftables.ChainPolicyDrop:
			return false, nil
		case kind != expr.VerdictAccept && kind != expr.VerdictContinue:
			return false, fmt.Errorf("chain %s: ends with verdict %d", c.Name, kind)
		}
	}
	return true, nil
}

func (p Packet) network() []byte {
	if p.Dest.Is4() {
		h := make([]byte, 20)
		h[0], h[9] = 0x45, p.Protocol
		copy(h[12:], p.Source.AsSlice())
		copy(h[16:], p.Dest.AsSlice())
		return h
	}
	h := make([]byte, 40)
	h[0], h[6] = 0x60, p.Protocol
	copy(h[8:], p.Source.AsSlice())
	copy(h[24:], p.Dest.AsSlice())
	return h
}

func (p Packet) transport() []byte {
	h := make([]byte, 12)
	binary.BigEndian.PutUint16(h, p.SourcePort)
	binary.BigEndian.PutUint16(h[2:], p.Port)
	return h
}

type machine struct {
	rs                 *packet.Ruleset
	packet             Packet
	network, transport []byte
	register           []byte // register 1, the only one in use
}

// chain returns the verdict, VerdictContinue where the chain has none.
func (m *machine) chain(c *packet.Chain, depth int) (expr.VerdictKind, error) {
	if depth > 16 { // NFT_JUMP_STACK_SIZE
		return 0, errors.New("chains go round in circles")
	}
	for i, rule := range c.Rules {
		v, err := m.rule(rule)
		if err != nil {
			return 0, fmt.Errorf("rule %d: %w", i, err)
		}
		switch v.Kind {
		case expr.VerdictContinue:
		case expr.VerdictGoto, expr.VerdictJump:
			j := slices.IndexFunc(m.rs.Chains, func(c packet.Chain) bool { return c.Name == v.Chain })
			if j < 0 {
				return 0, fmt.Errorf("rule %d: no chain %s", i, v.Chain)
			}
			kind, err := m.chain(&m.rs.Chains[j], depth+1)
			if err != nil || v.Kind == expr.VerdictGoto || kind != expr.VerdictContinue { // after a goto the rest of this chain is never met
				return kind, err
			}
		case expr.VerdictAccept, expr.VerdictDrop:
			return v.Kind, nil
		default:
			return 0, fmt.Errorf("rule %d: verdict %d", i, v.Kind)
		}
	}
	return expr.VerdictContinue, nil
}

var goesOn = expr.Verdict{Kind: expr.VerdictContinue}

// rule runs expressions until one does not match.
func (m *machine) rule(exprs []expr.Any) (expr.Verdict, error) {
	m.register = nil
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Meta:
			v, err := m.meta(e)
			if err != nil {
				return goesOn, err
			}
			m.register = v
		case *expr.Payload:
			header := m.transport
			if e.Base == expr.PayloadBaseNetworkHeader {
				header = m.network
			} else if e.Base != expr.PayloadBaseTransportHeader {
				return goesOn, fmt.Errorf("payload %+v", e)
			}
			if e.DestRegister != 1 || int(e.Offset+e.Len) > len(header) {
				return goesOn, fmt.Errorf("payload %+v of %d octets", e, len(header))
			}
			m.register = header[e.Offset : e.Offset+e.Len]
		case *expr.Ct:
			if e.Key == expr.CtKeyMARK && e.SourceRegister && e.Register == 1 {
				continue // marks the flow, and decides nothing
			}
			if e.SourceRegister || e.Register != 1 {
				return goesOn, fmt.Errorf("ct %+v", e)
			}
			if m.packet.Flow.Direction == Untracked {
				return goesOn, nil // NFT_BREAK
			}
			switch e.Key {
			case expr.CtKeyDIRECTION:
				m.register = []byte{byte(m.packet.Flow.Direction)} // IP_CT_DIR_ORIGINAL, IP_CT_DIR_REPLY
			case expr.CtKeyMARK:
				m.register = binary.NativeEndian.AppendUint32(nil, m.packet.Flow.Mark)
			default:
				return goesOn, fmt.Errorf("ct %+v", e)
			}
		case *expr.Bitwise:
			if e.SourceRegister != 1 || e.DestRegister != 1 || int(e.Len) != len(m.register) || len(e.Mask) != len(m.register) || len(e.Xor) != len(m.register) {
				return goesOn, fmt.Errorf("bitwise %+v on %d octets", e, len(m.register))
			}
			out := make([]byte, e.Len)
			for i := range out {
				out[i] = m.register[i]&e.Mask[i] ^ e.Xor[i]
			}
			m.register = out
		case *expr.Cmp:
			if e.Register != 1 || len(e.Data) != len(m.register) {
				return goesOn, fmt.Errorf("cmp %+v with %d octets", e, len(m.register))
			}
			equal := bytes.Equal(e.Data, m.register)
			switch {
			case e.Op != expr.CmpOpEq && e.Op != expr.CmpOpNeq:
				return goesOn, fmt.Errorf("cmp %+v", e)
			case equal != (e.Op == expr.CmpOpEq):
				return goesOn, nil
			}
		case *expr.Lookup:
			element, err := m.lookup(e)
			switch {
			case err != nil:
				return goesOn, err
			case element == nil:
				return goesOn, nil
			case element.VerdictData != nil:
				return *element.VerdictData, nil
			}
		case *expr.Verdict:
			return *e, nil
		default:
			return goesOn, fmt.Errorf("expression %T", e)
		}
	}
	return goesOn, nil
}

func (m *machine) meta(e *expr.Meta) ([]byte, error) {
	if e.SourceRegister || e.Register != 1 {
		return nil, fmt.Errorf("meta %+v", e)
	}
	name := func(s string) []byte { return append([]byte(s), make([]byte, unix.IFNAMSIZ-len(s))...) }
	switch e.Key {
	case expr.MetaKeyL4PROTO:
		return []byte{m.packet.Protocol}, nil
	case expr.MetaKeyNFPROTO:
		if m.packet.Dest.Is4() {
			return []byte{unix.NFPROTO_IPV4}, nil
		}
		return []byte{unix.NFPROTO_IPV6}, nil
	case expr.MetaKeyIIFNAME:
		return name(m.packet.In), nil
	case expr.MetaKeyOIFNAME:
		return name(m.packet.Out), nil
	case expr.MetaKeyMARK:
		return binary.NativeEndian.AppendUint32(nil, m.packet.Mark), nil
	}
	return nil, fmt.Errorf("meta key %d", e.Key)
}

// lookup finds the element of an interval set that holds the register: the greatest key that is not above it, if that begins an interval.
// Of an end and a beginning at the same key the beginning counts.
func (m *machine) lookup(e *expr.Lookup) (*nftables.SetElement, error) {
	if e.SourceRegister != 1 || e.Invert || e.DestRegister != 0 {
		return nil, fmt.Errorf("lookup %+v", e)
	}
	for i := range m.rs.Sets {
		s := &m.rs.Sets[i]
		if s.Name != e.SetName {
			continue
		}
		if s.ID != e.SetID || !s.Interval || s.IsMap != e.IsDestRegSet || int(s.KeyType.Bytes) != len(m.register) {
			return nil, fmt.Errorf("lookup %+v in set %+v with %d octets", e, s.Set, len(m.register))
		}
		var found *nftables.SetElement
		for j := range s.Elements {
			el := &s.Elements[j]
			if len(el.Key) != len(m.register) || el.IntervalEnd && el.VerdictData != nil || !el.IntervalEnd && s.IsMap && el.VerdictData == nil {
				return nil, fmt.Errorf("set %s: element %+v", s.Name, el)
			}
			if bytes.Compare(el.Key, m.register) > 0 {
				continue
			}
			if found != nil {
				switch c := bytes.Compare(el.Key, found.Key); {
				case c == 0 && el.IntervalEnd == found.IntervalEnd:
					return nil, fmt.Errorf("set %s: %x twice", s.Name, el.Key)
				case c < 0 || c == 0 && el.IntervalEnd:
					continue
				}
			}
			found = el
		}
		if found == nil || found.IntervalEnd {
			return nil, nil
		}
		return found, nil
	}
	return nil, fmt.Errorf("no set %s", e.SetName)
}
