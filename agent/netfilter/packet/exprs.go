package packet

import (
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// rule joins parts of a rule. Every part uses register 1.
func rule(parts ...[]expr.Any) []expr.Any {
	var out []expr.Any
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

func done(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

// goTo goes to a chain for good: it ends with a verdict of its own.
func goTo(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}
}

func equals(value []byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value}}
}

func meta(key expr.MetaKey, value []byte) []expr.Any {
	return append([]expr.Any{&expr.Meta{Key: key, Register: 1}}, equals(value)...)
}

func nfproto(v4 bool) []expr.Any {
	family := byte(unix.NFPROTO_IPV6)
	if v4 {
		family = unix.NFPROTO_IPV4
	}
	return meta(expr.MetaKeyNFPROTO, []byte{family})
}

// address loads the peer's address where the packet is of the family.
func (s sides) address(v4 bool) []expr.Any {
	p := &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: s.v6, Len: 16}
	if v4 {
		p.Offset, p.Len = s.v4, 4
	}
	return append(nfproto(v4), p)
}

// portLoaded loads the port that was asked for, which UDP and SCTP have in the same place.
func (s sides) portLoaded() []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: s.port, Len: 2}}
}

// reply goes on with what answers a flow that conntrack knows. What it does not know is none.
func reply() []expr.Any {
	return append([]expr.Any{&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}}, equals([]byte{1})...) // IP_CT_DIR_REPLY
}

// flowMark loads what markFlow gave.
func flowMark() []expr.Any { return []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1}} }

// markFlow gives a flow the mark that is loaded, by which Revoke knows the agent's own.
func markFlow() []expr.Any {
	return []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true}}
}

// lookup goes on where the set holds what is loaded; a verdict map takes over.
func lookup(s *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID, IsDestRegSet: s.IsMap}}
}

// interfaceName is a name as the kernel compares it: all of its 16 bytes, the rest zero, so that "lo" is not also "lo1".
func interfaceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}
