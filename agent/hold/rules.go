package hold

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const tableName = "mantlet_hold"

// The table comes after conntrack (-200), which so sees the app's packet, and before the redirect (-100), which changes its destination.
const priority = -150

func table() *nftables.Table {
	return &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
}

// family is what differs between IPv4 and IPv6.
type family struct {
	name     string
	proto    byte
	addrOff  uint32 // of the destination in the network header
	addrLen  uint32
	portReg  uint32 // the register behind the address in a concatenation
	addrType nftables.SetDatatype
}

var families = [2]family{
	{"4", unix.NFPROTO_IPV4, 16, 4, 9, nftables.TypeIPAddr},   // 9 is NFT_REG32_01
	{"6", unix.NFPROTO_IPV6, 24, 16, 2, nftables.TypeIP6Addr}, // 2 is NFT_REG_2
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// sets are the sets of one family.
type sets struct{ allowed, denied, used, external *nftables.Set }

// newSets names the sets. The agent writes allowed and denied and bounds them (a size would make the kernel allocate for it in advance);
// the kernel writes used.
func newSets(c Config) (s [2]sets) {
	for i, f := range families {
		key := nftables.MustConcatSetType(f.addrType, nftables.TypeInetService)
		set := func(name string, ttl time.Duration) *nftables.Set {
			return &nftables.Set{Table: table(), Name: name + f.name, KeyType: key, Concatenation: true, HasTimeout: ttl > 0, Timeout: ttl}
		}
		s[i] = sets{
			allowed:  set("allowed", ttl(true, c.Idle)),
			denied:   set("denied", ttl(false, c.Idle)),
			used:     set("used", c.Idle),
			external: set("external", 0),
		}
		s[i].used.Dynamic, s[i].used.Size = true, uint32(c.MaxAllowed)
		s[i].external.Interval = true
	}
	return s
}

// build puts the whole table into a transaction. In nft's own language, for one family:
//
//	chain output { type filter hook output priority -150; policy accept;
//		meta l4proto != tcp accept
//		tcp flags & (syn | ack) != syn accept
//		meta skuid 15150 accept
//		meta mark 0x6d74 accept
//		oifname "lo" accept
//		ip daddr 192.0.2.10 accept
//		ip daddr 10.0.0.0/8 goto cluster4
//		ip daddr . tcp dport @external4 accept
//		reject with tcp reset
//	}
//	chain cluster4 {
//		ip daddr . tcp dport @denied4 reject with tcp reset
//		ip daddr . tcp dport @allowed4 update @used4 { ip daddr . tcp dport }
//		ip daddr . tcp dport @allowed4 accept
//		meta mark 0x6d75 drop
//		limit rate over 1024/second burst 1024 packets reject with tcp reset
//		log group 15001 queue-threshold 1
//		drop
//	}
func build(conn *nftables.Conn, c Config, s [2]sets, holding bool) error {
	// Adding a table that exists changes nothing, deleting one that does not is an error: so add, delete, add.
	conn.AddTable(table())
	conn.DelTable(table())
	conn.AddTable(table())
	for _, f := range s {
		for _, set := range []*nftables.Set{f.allowed, f.denied, f.used, f.external} {
			if err := conn.AddSet(set, nil); err != nil {
				return fmt.Errorf("hold: set %s: %w", set.Name, err)
			}
		}
	}
	accept := nftables.ChainPolicyAccept
	output := conn.AddChain(&nftables.Chain{
		Name: "output", Table: table(), Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput,
		Priority: nftables.ChainPriorityRef(priority), Policy: &accept,
	})
	add := func(chain *nftables.Chain, parts ...[]expr.Any) {
		var exprs []expr.Any
		for _, p := range parts {
			exprs = append(exprs, p...)
		}
		conn.AddRule(&nftables.Rule{Table: table(), Chain: chain, Exprs: exprs})
	}
	var cluster [2]*nftables.Chain
	for i, f := range families {
		cluster[i] = conn.AddChain(&nftables.Chain{Name: "cluster" + f.name, Table: table()})
		add(cluster[i], f.in(s[i].denied), reset())
		add(cluster[i], f.in(s[i].allowed), f.note(s[i].used, c.Idle))
		add(cluster[i], f.in(s[i].allowed), decide(expr.VerdictAccept))
		add(cluster[i], meta(expr.MetaKeyMARK, expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(Mark)), decide(expr.VerdictDrop))
		if !holding {
			continue // on to Envoy
		}
		add(cluster[i], over(c.Rate), reset())
		add(cluster[i], log(c.Group))
		add(cluster[i], decide(expr.VerdictDrop))
	}
	pass := decide(expr.VerdictAccept)
	add(output, meta(expr.MetaKeyL4PROTO, expr.CmpOpNeq, []byte{unix.IPPROTO_TCP}), pass)
	add(output, noSYN(), pass)
	for _, uid := range c.UIDs {
		add(output, meta(expr.MetaKeySKUID, expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(uid)), pass)
	}
	add(output, meta(expr.MetaKeyMARK, expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(c.ProxyMark)), pass)
	lo := make([]byte, unix.IFNAMSIZ)
	copy(lo, "lo")
	add(output, meta(expr.MetaKeyOIFNAME, expr.CmpOpEq, lo), pass)
	for _, a := range c.Exempt {
		a = a.Unmap()
		add(output, to(netip.PrefixFrom(a, a.BitLen())), pass)
	}
	for _, p := range c.Cluster {
		chain := cluster[familyOf(p.Addr())]
		add(output, to(p), []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: chain.Name}})
	}
	for i, f := range families {
		add(output, f.is(), f.in(s[i].external), pass)
	}
	add(output, reset())
	return nil
}

func decide(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

// reset answers with a RST, which the app sees as ECONNREFUSED.
func reset() []expr.Any { return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}} }

func over(rate uint32) []expr.Any {
	return []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(rate), Unit: expr.LimitTimeSecond, Burst: rate, Over: true}}
}

// log sends the packet to NFLOG at once: without a threshold of 1 the kernel gathers packets for a second.
func log(group uint16) []expr.Any {
	return []expr.Any{&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_QTHRESHOLD, Group: group, QThreshold: 1}}
}

func meta(key expr.MetaKey, op expr.CmpOp, value []byte) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: value}}
}

const (
	flagSYN = 0x02
	flagACK = 0x10
)

func noSYN() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{flagSYN | flagACK}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{flagSYN}},
	}
}

func (f family) is() []expr.Any { return meta(expr.MetaKeyNFPROTO, expr.CmpOpEq, []byte{f.proto}) }

// to matches a destination in a prefix.
func to(p netip.Prefix) []expr.Any {
	f := families[familyOf(p.Addr())]
	return append(f.is(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: f.addrOff, Len: f.addrLen},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: f.addrLen, Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()), Xor: make([]byte, f.addrLen)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
	)
}

// destination loads address and port, one behind the other.
func (f family) destination() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: f.addrOff, Len: f.addrLen},
		&expr.Payload{DestRegister: f.portReg, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

func (f family) in(s *nftables.Set) []expr.Any {
	return append(f.destination(), &expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID})
}

// note writes that a destination is in use. A full set ends the rule, so the rule has no verdict.
func (f family) note(s *nftables.Set, ttl time.Duration) []expr.Any {
	return append(f.destination(), &expr.Dynset{
		SrcRegKey: 1, SetID: s.ID, SetName: s.Name, Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: ttl,
	})
}

// key is a destination as the sets have it: every field padded to 32 bits.
func key(d netip.AddrPort) []byte {
	return append(d.Addr().AsSlice(), byte(d.Port()>>8), byte(d.Port()), 0, 0)
}

// destinationOf is the inverse of key.
func destinationOf(key []byte) (netip.AddrPort, bool) {
	n := len(key) - 4
	if n < 0 {
		return netip.AddrPort{}, false
	}
	a, ok := netip.AddrFromSlice(key[:n])
	return netip.AddrPortFrom(a, uint16(key[n])<<8|uint16(key[n+1])), ok
}
