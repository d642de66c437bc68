package nftrules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter/packet"
)

// Translate says where the NAT chain of the output hook leads a new flow: to each address that the random number may choose, in its order; none
// where the flow stays what it is. The error is ErrRefused where it is dropped there.
func Translate(rs *packet.Ruleset, p Packet) ([]netip.AddrPort, error) {
	var out []netip.AddrPort
	for draw := uint32(0); ; draw++ {
		t := translator{machine: machine{rs: rs, packet: p, network: p.network(), transport: p.transport()}, draw: draw}
		to, err := t.run()
		if err != nil || !to.IsValid() {
			return nil, err
		}
		out = append(out, to)
		if draw+1 >= t.of {
			return out, nil
		}
	}
}

// ErrRefused says that a flow is dropped by the NAT chain.
var ErrRefused = errors.New("refused by the NAT chain")

// translator runs rules with all registers, and a number drawn.
type translator struct {
	machine
	registers [64]byte
	draw, of  uint32
}

func (t *translator) run() (netip.AddrPort, error) {
	for i := range t.rs.Chains {
		c := &t.rs.Chains[i]
		if c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookOutput {
			continue
		}
		if c.Type != nftables.ChainTypeNAT || *c.Priority != *nftables.ChainPriorityNATDest {
			return netip.AddrPort{}, fmt.Errorf("chain %s is no NAT chain", c.Name)
		}
		return t.through(c, 0)
	}
	return netip.AddrPort{}, fmt.Errorf("no NAT chain at output")
}

// through returns where a chain leads; the zero value: nowhere else.
func (t *translator) through(c *packet.Chain, depth int) (netip.AddrPort, error) {
	for _, rule := range c.Rules {
		to, v, err := t.rule(rule)
		switch {
		case err != nil || to.IsValid() || v.Kind == expr.VerdictAccept:
			return to, err
		case v.Kind == expr.VerdictContinue:
		case v.Kind == expr.VerdictDrop:
			return netip.AddrPort{}, ErrRefused
		case v.Kind == expr.VerdictGoto && depth < 16:
			for i := range t.rs.Chains {
				if t.rs.Chains[i].Name == v.Chain {
					return t.through(&t.rs.Chains[i], depth+1)
				}
			}
			return netip.AddrPort{}, fmt.Errorf("no chain %s", v.Chain)
		default:
			return netip.AddrPort{}, fmt.Errorf("chain %s: verdict %+v", c.Name, v)
		}
	}
	return netip.AddrPort{}, nil
}

// at is where a register begins.
func at(register uint32) int {
	if register >= unix.NFT_REG32_00 {
		return int(register-unix.NFT_REG32_00) * 4
	}
	return int(register-unix.NFT_REG_1) * 16
}

// load writes a value, filled up to whole registers of four bytes.
func (t *translator) load(register uint32, value []byte) {
	clear(t.registers[at(register) : at(register)+(len(value)+3)/4*4])
	copy(t.registers[at(register):], value)
}

func (t *translator) rule(exprs []expr.Any) (to netip.AddrPort, v expr.Verdict, err error) {
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Meta:
			value, err := t.meta(&expr.Meta{Key: e.Key, Register: 1})
			if err != nil {
				return to, goesOn, err
			}
			t.load(e.Register, value)
		case *expr.Cmp:
			if e.Op != expr.CmpOpEq {
				return to, goesOn, fmt.Errorf("cmp %+v", e)
			}
			if !bytes.Equal(t.registers[at(e.Register):at(e.Register)+len(e.Data)], e.Data) {
				return to, goesOn, nil
			}
		case *expr.Payload:
			header := t.transport
			if e.Base == expr.PayloadBaseNetworkHeader {
				header = t.network
			}
			t.load(e.DestRegister, header[e.Offset:e.Offset+e.Len])
		case *expr.Numgen:
			if e.Type != unix.NFT_NG_RANDOM || e.Modulus == 0 || e.Offset != 0 {
				return to, goesOn, fmt.Errorf("numgen %+v", e)
			}
			t.of = e.Modulus
			t.load(e.Register, binary.NativeEndian.AppendUint32(nil, t.draw%e.Modulus))
		case *expr.Lookup:
			element, err := t.find(e)
			switch {
			case err != nil || element == nil:
				return to, goesOn, err
			case element.VerdictData != nil:
				return to, *element.VerdictData, nil
			}
			t.load(e.DestRegister, element.Val)
		case *expr.NAT:
			words, family := 1, uint32(unix.NFPROTO_IPV4)
			if t.packet.Dest.Is6() {
				words, family = 4, unix.NFPROTO_IPV6
			}
			if e.Type != expr.NATTypeDestNAT || e.Family != family || !e.Specified || e.RegAddrMax != e.RegAddrMin || e.RegProtoMax != e.RegProtoMin {
				return to, goesOn, fmt.Errorf("nat %+v", e)
			}
			a, _ := netip.AddrFromSlice(t.registers[at(e.RegAddrMin) : at(e.RegAddrMin)+4*words])
			return netip.AddrPortFrom(a, binary.BigEndian.Uint16(t.registers[at(e.RegProtoMin):])), goesOn, nil
		case *expr.Verdict:
			return to, *e, nil
		default:
			return to, goesOn, fmt.Errorf("expression %T", e)
		}
	}
	return to, goesOn, nil
}

// find looks up what is loaded in a set without intervals.
func (t *translator) find(e *expr.Lookup) (*nftables.SetElement, error) {
	for i := range t.rs.Sets {
		s := &t.rs.Sets[i]
		if s.Name != e.SetName {
			continue
		}
		if s.ID != e.SetID || s.Interval || !s.IsMap || e.Invert || !e.IsDestRegSet {
			return nil, fmt.Errorf("lookup %+v in set %+v", e, s.Set)
		}
		key := t.registers[at(e.SourceRegister) : at(e.SourceRegister)+int(s.KeyType.Bytes)]
		for j := range s.Elements {
			if len(s.Elements[j].Key) != len(key) {
				return nil, fmt.Errorf("set %s: element %+v", s.Name, s.Elements[j])
			}
			if bytes.Equal(s.Elements[j].Key, key) {
				return &s.Elements[j], nil
			}
		}
		return nil, nil
	}
	return nil, fmt.Errorf("no set %s", e.SetName)
}
