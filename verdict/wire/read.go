package wire

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	mantletv1 "github.com/mantlet/mantlet/api/mantlet/v1"
	"github.com/mantlet/mantlet/verdict"
)

// Unmarshal reads what [Marshal] wrote. The error names the place and what is wrong there.
func Unmarshal(b []byte) (*verdict.Verdicts, error) {
	m := new(mantletv1.Verdicts)
	if err := proto.Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("verdicts: not the message: %w", err)
	}
	v, err := read(m)
	if err != nil {
		return nil, fmt.Errorf("verdicts: %w", err)
	}
	if !proto.Equal(Message(v), m) {
		return nil, errors.New("verdicts: a field that is not known, or an identity that nothing points at")
	}
	return v, nil
}

// Marshal writes verdicts as bytes, the same for the same verdicts.
func Marshal(v *verdict.Verdicts) ([]byte, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(Message(v))
	if err != nil {
		return nil, fmt.Errorf("verdicts of %s: %w", v.Subject, err)
	}
	return b, nil
}

func read(m *mantletv1.Verdicts) (*verdict.Verdicts, error) {
	v := new(verdict.Verdicts)
	var err error
	if v.Subject, err = spiffeid.FromString(m.Subject); err != nil {
		return nil, fmt.Errorf("subject %q: %w", m.Subject, err)
	}
	switch m.Mode {
	case mantletv1.Mode_MODE_PERMISSIVE:
		v.Mode = verdict.Permissive
	case mantletv1.Mode_MODE_STRICT:
		v.Mode = verdict.Strict
	default:
		return nil, fmt.Errorf("mode %d is not known", m.Mode)
	}
	r := reader{ids: make([]spiffeid.ID, len(m.Identities))}
	for i, text := range m.Identities {
		if r.ids[i], err = spiffeid.FromString(text); err != nil {
			return nil, fmt.Errorf("identities[%d] %q: %w", i, text, err)
		}
		if i > 0 && m.Identities[i-1] >= text {
			return nil, fmt.Errorf("identities[%d] %q: out of order, or listed twice", i, text)
		}
	}
	if v.Ingress, err = r.table(m.Ingress); err != nil {
		return nil, fmt.Errorf("ingress: %w", err)
	}
	if v.Egress, err = r.table(m.Egress); err != nil {
		return nil, fmt.Errorf("egress: %w", err)
	}
	return v, nil
}

// reader reads one table after the other.
type reader struct {
	ids     []spiffeid.ID
	reasons int // of the table that is being read
}

func (r *reader) table(m *mantletv1.Table) (t verdict.Table, err error) {
	if m == nil {
		return t, errors.New("is missing")
	}
	for i, p := range m.Isolating {
		if p == "" || i > 0 && m.Isolating[i-1] >= p {
			return t, fmt.Errorf("isolating[%d] %q: empty, out of order, or listed twice", i, p)
		}
	}
	t.Isolating = m.Isolating
	for _, w := range m.Rules {
		t.Rules = append(t.Rules, verdict.Rule{Policy: w.Policy, Rule: w.Rule, Peers: w.Peers, Ports: w.Ports})
	}
	// Never nil, as the compiler has it: the hash tells one from the other.
	t.Reasons, t.Blocks = make([]verdict.Reason, 0, len(m.Reasons)), make([]verdict.Block, 0, len(m.Blocks))
	seen := map[verdict.Reason]bool{}
	for i, w := range m.Reasons {
		reason := verdict.Reason{Policy: w.Policy, Rule: w.Rule, Text: w.Text, Nearest: w.Nearest}
		if seen[reason] {
			return t, fmt.Errorf("reasons[%d] %q: listed twice", i, w.Text)
		}
		seen[reason] = true
		t.Reasons = append(t.Reasons, reason)
	}
	r.reasons = len(t.Reasons)
	for i, w := range m.Blocks {
		b, err := r.block(w)
		if err != nil {
			return t, fmt.Errorf("blocks[%d]: %w", i, err)
		}
		if i > 0 && !before(&t.Blocks[i-1], &b) {
			return t, fmt.Errorf("blocks[%d]: %s %s is out of order", i, b.Protocol, b.Ports[0])
		}
		t.Blocks = append(t.Blocks, b)
	}
	return t, disjoint(t.Blocks)
}

func before(a, b *verdict.Block) bool {
	if a.Protocol != b.Protocol {
		return a.Protocol < b.Protocol
	}
	return a.Ports[0].First < b.Ports[0].First
}

// disjoint fails where two blocks speak of the same port: then it would matter which one is looked at first.
func disjoint(blocks []verdict.Block) error {
	for _, proto := range verdict.Protocols {
		var all []verdict.PortRange
		for i := range blocks {
			if blocks[i].Protocol == proto {
				all = append(all, blocks[i].Ports...)
			}
		}
		slices.SortFunc(all, func(a, b verdict.PortRange) int { return int(a.First) - int(b.First) })
		for i := 1; i < len(all); i++ {
			if all[i].First <= all[i-1].Last {
				return fmt.Errorf("two blocks speak of port %d/%s", all[i].First, proto)
			}
		}
	}
	return nil
}

func (r *reader) block(m *mantletv1.Block) (b verdict.Block, err error) {
	switch m.Protocol {
	case mantletv1.Protocol_PROTOCOL_TCP:
		b.Protocol = verdict.TCP
	case mantletv1.Protocol_PROTOCOL_UDP:
		b.Protocol = verdict.UDP
	case mantletv1.Protocol_PROTOCOL_SCTP:
		b.Protocol = verdict.SCTP
	default:
		return b, fmt.Errorf("protocol %d is not known", m.Protocol)
	}
	if b.Ports, err = portRanges(m.Ports); err != nil {
		return b, err
	}
	for i, e := range m.ByIdentity {
		if uint64(e.Id) >= uint64(len(r.ids)) {
			return b, fmt.Errorf("by_identity[%d]: there is no identity %d", i, e.Id)
		}
		if i > 0 && e.Id <= m.ByIdentity[i-1].Id {
			return b, fmt.Errorf("by_identity[%d]: %s is out of order, or listed twice", i, r.ids[e.Id])
		}
		id := verdict.Identity{ID: r.ids[e.Id]}
		if id.Verdict, err = r.verdict(e.Allow, e.Reason); err != nil {
			return b, fmt.Errorf("by_identity[%d]: %w", i, err)
		}
		if id.Addresses, err = r.prefixes(e.Addresses); err != nil {
			return b, fmt.Errorf("by_identity[%d].addresses%w", i, err)
		}
		if len(id.Addresses) > 0 && id.Verdict.Allow {
			return b, fmt.Errorf("by_identity[%d]: addresses decide on %s, and all others are allowed too", i, id.ID)
		}
		b.Peers.ByIdentity = append(b.Peers.ByIdentity, id)
	}
	if b.Peers.Identified, err = r.prefixes(m.Identified); err != nil {
		return b, fmt.Errorf("identified%w", err)
	}
	if b.Peers.Anonymous, err = r.prefixes(m.Anonymous); err != nil {
		return b, fmt.Errorf("anonymous%w", err)
	}
	return b, nil
}

func portRanges(list []*mantletv1.PortRange) (out []verdict.PortRange, err error) {
	if len(list) == 0 {
		return nil, errors.New("has no ports")
	}
	for i, p := range list {
		if p.First < 1 || p.First > p.Last || p.Last > 65535 {
			return nil, fmt.Errorf("ports[%d]: %d-%d is no range of ports", i, p.First, p.Last)
		}
		if i > 0 && p.First <= list[i-1].Last+1 {
			return nil, fmt.Errorf("ports[%d]: %d-%d is out of order, or not apart from the one before", i, p.First, p.Last)
		}
		out = append(out, verdict.PortRange{First: uint16(p.First), Last: uint16(p.Last)})
	}
	return out, nil
}

func (r *reader) verdict(allow bool, reason uint32) (verdict.Verdict, error) {
	if uint64(reason) >= uint64(r.reasons) {
		return verdict.Verdict{}, fmt.Errorf("there is no reason %d", reason)
	}
	return verdict.Verdict{Allow: allow, Reason: int(reason)}, nil
}

// prefixes reads a list. Its errors begin with the index in brackets.
func (r *reader) prefixes(list []*mantletv1.PrefixVerdict) ([]verdict.Prefix, error) {
	var out []verdict.Prefix
	for i, m := range list {
		p, err := readPrefix(m.Address, m.Bits)
		if err != nil {
			return nil, fmt.Errorf("[%d]: %w", i, err)
		}
		if i > 0 && !less(out[i-1].Prefix, p) {
			return nil, fmt.Errorf("[%d]: %s is out of order, or listed twice", i, p)
		}
		v, err := r.verdict(m.Allow, m.Reason)
		if err != nil {
			return nil, fmt.Errorf("[%d]: %w", i, err)
		}
		out = append(out, verdict.Prefix{Prefix: p, Verdict: v})
	}
	return out, nil
}

func readPrefix(address []byte, bits uint32) (netip.Prefix, error) {
	addr, ok := netip.AddrFromSlice(address)
	if !ok || addr.Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%x is no address", address)
	}
	if uint64(bits) > uint64(addr.BitLen()) {
		return netip.Prefix{}, fmt.Errorf("%s has no prefix of %d bits", addr, bits)
	}
	p := netip.PrefixFrom(addr, int(bits))
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("%s is not zero after its prefix", p)
	}
	return p, nil
}

func less(a, b netip.Prefix) bool {
	if c := a.Addr().Compare(b.Addr()); c != 0 {
		return c < 0
	}
	return a.Bits() < b.Bits()
}
