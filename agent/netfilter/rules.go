package netfilter

import (
	"bytes"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// tableName is the table in the family inet.
const tableName = "mantlet"

func table() *nftables.Table {
	return &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
}

// wanted is a chain as it should be.
type wanted struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

// chains are the whole table. In nft's own language:
//
//	chain prerouting { type nat hook prerouting priority -100; policy accept;
//		iifname "lo" return
//		meta l4proto tcp redirect to :15006
//	}
//	chain output { type nat hook output priority -100; policy accept;
//		meta skuid 15150 return
//		meta mark 0x6d74 return
//		oifname "lo" return
//		meta l4proto tcp redirect to :15001
//	}
func (c Config) chains() []wanted {
	var exempt [][]expr.Any
	for _, uid := range c.UIDs {
		exempt = append(exempt, returnIf(expr.MetaKeySKUID, binaryutil.NativeEndian.PutUint32(uid)))
	}
	exempt = append(exempt, returnIf(expr.MetaKeyMARK, binaryutil.NativeEndian.PutUint32(c.Mark)))
	return []wanted{
		{natChain("prerouting", nftables.ChainHookPrerouting), [][]expr.Any{
			// What came through lo went through output, and NAT decides once for each connection. This says so to whoever reads the table.
			returnIf(expr.MetaKeyIIFNAME, interfaceName("lo")),
			redirectTCP(c.InboundPort),
		}},
		{natChain("output", nftables.ChainHookOutput), append(exempt,
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

// returnIf leaves the chain, and so the connection as it is, where a property of the packet has the given value.
func returnIf(key expr.MetaKey, value []byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value},
		&expr.Verdict{Kind: expr.VerdictReturn},
	}
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

// check compares the chain with the one that the kernel has.
func (w wanted) check(conn *nftables.Conn, got *nftables.Chain) error {
	name := w.chain.Name
	switch {
	case got.Type != w.chain.Type || got.Hooknum == nil || *got.Hooknum != *w.chain.Hooknum:
		return fmt.Errorf("redirect: chain %s is not the NAT chain of its hook", name)
	case got.Priority == nil || *got.Priority != *w.chain.Priority:
		return fmt.Errorf("redirect: chain %s does not have priority %d", name, *w.chain.Priority)
	case got.Policy == nil || *got.Policy != *w.chain.Policy:
		return fmt.Errorf("redirect: chain %s does not have policy accept", name)
	}
	rules, err := conn.GetRules(got.Table, got)
	if err != nil {
		return fmt.Errorf("redirect: read chain %s: %w", name, err)
	}
	if len(rules) != len(w.rules) {
		return fmt.Errorf("redirect: chain %s has %d rules, not %d", name, len(rules), len(w.rules))
	}
	for i, rule := range rules {
		same, err := sameExprs(rule.Exprs, w.rules[i])
		if err != nil {
			return fmt.Errorf("redirect: chain %s, rule %d: %w", name, i+1, err)
		}
		if !same {
			return fmt.Errorf("redirect: chain %s, rule %d is not what was written", name, i+1)
		}
	}
	return nil
}

// sameExprs compares by what would go to the kernel.
func sameExprs(a, b []expr.Any) (bool, error) {
	if len(a) != len(b) {
		return false, nil
	}
	for i := range a {
		x, err := expr.Marshal(byte(nftables.TableFamilyINet), a[i])
		if err != nil {
			return false, err
		}
		y, err := expr.Marshal(byte(nftables.TableFamilyINet), b[i])
		if err != nil {
			return false, err
		}
		if !bytes.Equal(x, y) {
			return false, nil
		}
	}
	return true, nil
}
