package hold

import (
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// TableName is the table in the family inet.
const TableName = "mantlet_hold"

// The table comes after conntrack (-200), which so sees the app's packet, and before the redirect (-100), which changes its destination.
const priority = -150

func table() *nftables.Table {
	return &nftables.Table{Name: TableName, Family: nftables.TableFamilyINet}
}

// family is what differs between IPv4 and IPv6.
type family struct {
	name     string
	proto    byte
	from, to uint32 // offsets of source and destination in the network header
	addrLen  uint32
	portReg  uint32 // the register behind the address in a concatenation
	addrType nftables.SetDatatype
}

var families = [2]family{
	{"4", unix.NFPROTO_IPV4, 12, 16, 4, 9, nftables.TypeIPAddr},  // 9 is NFT_REG32_01
	{"6", unix.NFPROTO_IPV6, 8, 24, 16, 2, nftables.TypeIP6Addr}, // 2 is NFT_REG_2
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// sets are the sets of one family that speak of destinations inside the cluster, and services those that are so wherever they are.
type sets struct{ allowed, denied, used, services *nftables.Set }

// newSets names the sets. The agent writes allowed and denied and bounds them (a size would make the kernel allocate for it in advance);
// the kernel writes used.
func newSets(c Config) (s [2]sets) {
	id := uint32(0)
	for i, f := range families {
		key := nftables.MustConcatSetType(f.addrType, nftables.TypeInetService)
		set := func(name string, ttl time.Duration) *nftables.Set {
			id++ // the library would count without a lock
			return &nftables.Set{Table: table(), Name: name + f.name, ID: id, KeyType: key, Concatenation: true, HasTimeout: true, Timeout: ttl}
		}
		s[i] = sets{allowed: set("allowed", ttl(true, c.Idle)), denied: set("denied", ttl(false, c.Idle)), used: set("used", c.Idle)}
		id++
		s[i].services = &nftables.Set{Table: table(), Name: "services" + f.name, ID: id, KeyType: key, Concatenation: true}
		s[i].used.Dynamic, s[i].used.Size = true, uint32(c.MaxAllowed)
	}
	return s
}

// chains are the chains but for those that judge addresses outside the cluster. In nft's own language, for one family:
//
//	chain output { type filter hook output priority -150; policy accept;
//		meta l4proto != tcp accept
//		tcp flags & (syn | ack) != syn accept
//		meta skuid 2012345678 meta skgid 2087654321 accept
//		meta mark 0x6d74 accept
//		oifname "lo" accept
//		tcp dport 15001 goto refuse   # Envoy's own port: nobody gets anywhere from there
//		meta nfproto ipv4 tcp dport 30000-32767 goto cluster4
//		meta nfproto ipv4 ip daddr . tcp dport @services4 goto cluster4
//		ip daddr 192.0.2.10 accept
//		ip daddr 10.0.0.0/8 goto cluster4
//		goto external
//	}
//	chain cluster4 {
//		ip daddr . tcp dport @denied4 goto refuse
//		ip daddr . tcp dport @allowed4 update @used4 { ip daddr . tcp dport }
//		ip daddr . tcp dport @allowed4 accept
//		meta mark 0x6d75 drop
//		limit rate over 1024/second burst 1024 packets goto refuse
//		log group 15001 queue-threshold 1
//		drop
//	}
//	chain refuse {
//		limit rate 100/second burst 100 packets log prefix "refused" group 15001 queue-threshold 1
//		reject with tcp reset
//	}
//	chain prerouting { type filter hook prerouting priority -150; policy accept;
//		meta l4proto != tcp accept
//		tcp flags & (syn | ack) != syn accept
//		iifname "lo" accept
//		ip saddr 192.0.2.10 accept
//		ip saddr 10.0.0.0/8 accept              # who proves an identity comes from here
//		goto inbound
//	}
func chains(c Config, s [2]sets, holding bool) []netfilter.Chain {
	list := []netfilter.Chain{hooked("output", nftables.ChainHookOutput), hooked("prerouting", nftables.ChainHookPrerouting)}
	output, prerouting := &list[0], &list[1]
	pass := decide(expr.VerdictAccept)
	for _, chain := range []*netfilter.Chain{output, prerouting} {
		chain.Rules = append(chain.Rules, rule(meta(expr.MetaKeyL4PROTO, expr.CmpOpNeq, []byte{unix.IPPROTO_TCP}), pass), rule(noSYN(), pass))
	}
	for _, u := range c.Users {
		output.Rules = append(output.Rules, rule(netfilter.Is(u), pass))
	}
	lo := make([]byte, unix.IFNAMSIZ)
	copy(lo, "lo")
	output.Rules = append(output.Rules,
		rule(meta(expr.MetaKeyMARK, expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(c.ProxyMark)), pass),
		rule(meta(expr.MetaKeyOIFNAME, expr.CmpOpEq, lo), pass),
		rule(toPorts(verdict.PortRange{First: names.OutboundPort, Last: names.OutboundPort}), refuse()))
	prerouting.Rules = append(prerouting.Rules, rule(meta(expr.MetaKeyIIFNAME, expr.CmpOpEq, lo), pass))
	var cluster []netfilter.Chain
	for i, f := range families {
		cluster = append(cluster, f.held(c, s[i], holding))
		if len(c.Cluster) > 0 { // else all is to be refused, without a question
			output.Rules = append(output.Rules, rule(f.is(), toPorts(c.NodePorts), jump(cluster[i].Chain)), rule(f.is(), f.in(s[i].services), jump(cluster[i].Chain)))
		}
	}
	for _, a := range c.Exempt {
		a = a.Unmap()
		node := netip.PrefixFrom(a, a.BitLen())
		output.Rules = append(output.Rules, rule(to(node), pass))
		prerouting.Rules = append(prerouting.Rules, rule(from(node), pass))
	}
	for _, p := range c.Cluster {
		output.Rules = append(output.Rules, rule(to(p), jump(cluster[familyOf(p.Addr())].Chain)))
		prerouting.Rules = append(prerouting.Rules, rule(from(p), pass))
	}
	output.Rules = append(output.Rules, jump(external.dispatch().Chain))
	prerouting.Rules = append(prerouting.Rules, jump(inbound.dispatch().Chain))
	return append(append(list, cluster...), refusing(c, holding))
}

// refusing is the chain that ends a connection, and says so: to the app or the peer by a RST, which it sees as ECONNREFUSED, and to the
// agent by NFLOG, not more often than is of use.
func refusing(c Config, holding bool) netfilter.Chain {
	chain := refuseChain()
	if holding { // there is an NFLOG
		chain.Rules = append(chain.Rules, rule(limit(refusalsLogged, false), []expr.Any{&expr.Log{
			Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_QTHRESHOLD | 1<<unix.NFTA_LOG_PREFIX, Group: c.Group, QThreshold: 1, Data: []byte(refusedPrefix)}}))
	}
	chain.Rules = append(chain.Rules, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	return chain
}

const (
	refusedPrefix  = "refused" // tells the packets of that chain from those that are asked about
	refusalsLogged = 100       // a second
)

func refuseChain() netfilter.Chain {
	return netfilter.Chain{Chain: &nftables.Chain{Name: "refuse", Table: table()}}
}

func refuse() []expr.Any { return jump(refuseChain().Chain) }

// held is the chain for destinations inside the cluster.
func (f family) held(c Config, s sets, holding bool) netfilter.Chain {
	chain := netfilter.Chain{Chain: &nftables.Chain{Name: "cluster" + f.name, Table: table()}}
	chain.Rules = [][]expr.Any{
		rule(f.in(s.denied), refuse()),
		rule(f.in(s.allowed), f.note(s.used, c.Idle)),
		rule(f.in(s.allowed), decide(expr.VerdictAccept)),
		rule(meta(expr.MetaKeyMARK, expr.CmpOpEq, binaryutil.NativeEndian.PutUint32(Mark)), decide(expr.VerdictDrop)),
	}
	if holding { // else on to Envoy
		chain.Rules = append(chain.Rules, rule(over(c.Rate), refuse()), log(c.Group), decide(expr.VerdictDrop))
	}
	return chain
}

func hooked(name string, hook *nftables.ChainHook) netfilter.Chain {
	accept := nftables.ChainPolicyAccept
	return netfilter.Chain{Chain: &nftables.Chain{
		Name: name, Table: table(), Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityRef(priority), Policy: &accept,
	}}
}

// rule joins parts of a rule. Every part uses register 1 first.
func rule(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

// jump goes to a chain for good.
func jump(c *nftables.Chain) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictGoto, Chain: c.Name}}
}

func decide(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }

func over(rate uint32) []expr.Any { return limit(rate, true) }

// limit matches packets up to a rate, or those over it.
func limit(rate uint32, above bool) []expr.Any { //nolint:revive // the kernel's own flag
	return []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(rate), Unit: expr.LimitTimeSecond, Burst: rate, Over: above}}
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

// to matches a destination in a prefix, from a source.
func to(p netip.Prefix) []expr.Any   { return within(p, families[familyOf(p.Addr())].to) }
func from(p netip.Prefix) []expr.Any { return within(p, families[familyOf(p.Addr())].from) }

func within(p netip.Prefix, offset uint32) []expr.Any {
	f := families[familyOf(p.Addr())]
	return append(f.is(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: f.addrLen},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: f.addrLen, Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()), Xor: make([]byte, f.addrLen)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
	)
}

// toPorts matches destination ports; a SYN has no port 0.
func toPorts(r verdict.PortRange) []expr.Any {
	exprs := []expr.Any{&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}
	if r.First == r.Last {
		return append(exprs, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(r.First)})
	}
	return append(exprs,
		&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: binaryutil.BigEndian.PutUint16(r.First)},
		&expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: binaryutil.BigEndian.PutUint16(r.Last)})
}

// destination loads address and port, one behind the other.
func (f family) destination() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: f.to, Len: f.addrLen},
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
