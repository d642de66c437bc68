package netfilter

import (
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/xds/proxyuser"
)

// tableName is the table in the family inet, outputChain the chain that tells whose connections pass.
const (
	tableName   = "mantlet"
	outputChain = "output"
)

func table() *nftables.Table {
	return &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
}

// chains are the whole table. In nft's own language:
//
//	ct timeout reset { protocol tcp; policy = { close: 0, … } }
//	chain remember { type filter hook output priority -160; policy accept;
//		meta skuid 2012345678 meta skgid 2087654321 meta mark set 0x6d74   # Marked
//		meta l4proto tcp ct timeout set "reset"
//	}
//	chain prerouting { type nat hook prerouting priority -100; policy accept;
//		iifname "lo" return
//		ip saddr 192.0.2.10 tcp sport 443 redirect to :15006   # each service at such an address
//		ip saddr 192.0.2.10 tcp sport != 30000-32767 tcp dport != 15006 tcp dport != 15001 return   # each address of the own node
//		meta l4proto tcp redirect to :15006
//	}
//	chain output { type nat hook output priority -100; policy accept;
//		meta skuid 2012345678 meta skgid 2087654321 return   # Users
//		meta mark 0x6d74 return
//		oifname "lo" return
//		meta l4proto tcp redirect to :15001
//	}
func (c Config) chains() []Chain {
	var exempt [][]expr.Any
	for _, u := range c.Users {
		exempt = append(exempt, exemption(u))
	}
	exempt = append(exempt, returnIf(expr.MetaKeyMARK, binaryutil.NativeEndian.PutUint32(c.Mark)))
	var remember [][]expr.Any
	for _, u := range c.Marked {
		remember = append(remember, markIf(u, c.Mark))
	}
	// What came through lo went through output, and NAT decides once for each connection. This says so to whoever reads the table.
	direct := [][]expr.Any{returnIf(expr.MetaKeyIIFNAME, interfaceName("lo"))}
	for _, s := range c.Services {
		direct = append(direct, append(balanced(s), redirectTCP(c.InboundPort)...))
	}
	for _, a := range c.Node {
		direct = append(direct, c.passOwnNode(a))
	}
	return []Chain{
		{rememberChain(), append(remember, forgetReset())},
		{natChain("prerouting", nftables.ChainHookPrerouting), append(direct, redirectTCP(c.InboundPort))},
		{natChain(outputChain, nftables.ChainHookOutput), append(exempt,
			returnIf(expr.MetaKeyOIFNAME, interfaceName("lo")),
			redirectTCP(c.OutboundPort),
		)},
	}
}

func natChain(name string, hook *nftables.ChainHook) *nftables.Chain {
	accept := nftables.ChainPolicyAccept
	return &nftables.Chain{
		Name: name, Table: table(), Type: nftables.ChainTypeNAT, Hooknum: hook, Priority: nftables.ChainPriorityNATDest, Policy: &accept,
	}
}

// Is matches packets of sockets that were made by a user with its group: what threads had for files at the time (fsuid, fsgid).
func Is(u proxyuser.User) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeySKUID, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(u.UID)},
		&expr.Meta{Key: expr.MetaKeySKGID, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(u.GID)},
	}
}

// exemption leaves the chain, and so a user's connections as they are.
func exemption(u proxyuser.User) []expr.Any {
	return append(Is(u), &expr.Verdict{Kind: expr.VerdictReturn})
}

// returnIf leaves the chain, and so the connection as it is, where a property of the packet has the given value.
func returnIf(key expr.MetaKey, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value},
		&expr.Verdict{Kind: expr.VerdictReturn},
	}
}

// markIf gives a user's packets a mark.
func markIf(u proxyuser.User, mark uint32) []expr.Any {
	return append(Is(u),
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(mark)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1})
}

// redirectTCP sends TCP to a port of this network namespace.
func redirectTCP(port uint16) []expr.Any {
	const protoSpecified = 2 // NF_NAT_RANGE_PROTO_SPECIFIED of linux/netfilter/nf_nat.h
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
		// The kernel reads one port back as a range of one: written so, what is read equals what was written.
		&expr.Redir{RegisterProtoMin: 1, RegisterProtoMax: 1, Flags: protoSpecified},
	}
}

// interfaceName is a name as the kernel compares it: all of its 16 bytes, the rest zero, so that "lo" is not also "lo1".
func interfaceName(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}
