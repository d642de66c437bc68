package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Protocol of a port, by its number.
type Protocol uint8

// The protocols that the sandbox's network carries.
const (
	TCP Protocol = unix.IPPROTO_TCP
	UDP Protocol = unix.IPPROTO_UDP
)

// orTCP is TCP where none is named, as in the Kubernetes API.
func (p Protocol) orTCP() Protocol {
	if p == 0 {
		return TCP
	}
	return p
}

// Service is one port of a ClusterIP, and where connections to it go.
type Service struct {
	Addr     netip.AddrPort
	Protocol Protocol
	// Backends are chosen at random for each connection. Without any, connections are refused.
	Backends []netip.AddrPort
	// Masqueraded says that connections come to them from the node's address.
	Masqueraded bool
}

func (s Service) check() error {
	switch a := s.Addr.Addr(); {
	case !a.IsValid() || a.Is4In6() || a.Zone() != "" || s.Addr.Port() == 0:
		return errors.New("give an IPv4 or IPv6 address and a port")
	case s.Protocol != TCP && s.Protocol != UDP:
		return fmt.Errorf("protocol %d: only TCP and UDP", s.Protocol)
	}
	for _, b := range s.Backends {
		if b.Addr().BitLen() != s.Addr.Addr().BitLen() || b.Addr().Is4In6() || b.Port() == 0 {
			return fmt.Errorf("backend %s: give an address of the same family and a port", b)
		}
	}
	return nil
}

// SetServices replaces all Services in one step: every packet meets the old ones or the new ones. Connections that are open keep their
// backend.
func (n *Network) SetServices(services []Service) error {
	type port struct {
		addr     netip.AddrPort
		protocol Protocol
	}
	seen := map[port]bool{}
	for _, s := range services {
		key := port{s.Addr, s.Protocol}
		err := s.check()
		if err == nil && seen[key] {
			err = errors.New("it is given twice")
		}
		if err != nil {
			return fmt.Errorf("service %s: %w", s.Addr, err)
		}
		seen[key] = true
	}
	n.servicesMu.Lock()
	defer n.servicesMu.Unlock()
	if err := n.replaceTable(services); err != nil {
		return fmt.Errorf("set %d services in the kernel: %w", len(services), err)
	}
	return nil
}

// tableNames are the node's table and the one that is to replace it.
var tableNames = [2]string{"mantlet-node-0", "mantlet-node-1"}

// replaceTable prepares a second table, without hooks, in as many transactions as its size takes (an ordinary user's are bounded), and
// swaps the two in one.
func (n *Network) replaceTable(services []Service) error {
	before, after := tableNames[n.table], tableNames[1-n.table]
	t, err := openTable(after)
	if err != nil {
		return err
	}
	t.empty(after)
	t.connections.AddTable(t.table)
	err = errors.Join(t.family(ipv4, services), t.family(ipv6, services))
	if err != nil {
		return errors.Join(err, clearTables(after))
	}
	t.hookUp(ipv4, n.config.Node4)
	t.hookUp(ipv6, n.config.Node6)
	t.rejectUnknown()
	t.empty(before)
	if err := t.connections.Flush(); err != nil {
		return errors.Join(err, clearTables(after))
	}
	n.table = 1 - n.table
	return nil
}

func clearTables(names ...string) error {
	t, err := openTable("")
	if err != nil {
		return err
	}
	for _, name := range names {
		t.empty(name)
	}
	return t.connections.Flush()
}

// empty deletes a table, there or not.
func (t *table) empty(name string) {
	gone := &nftables.Table{Family: nftables.TableFamilyINet, Name: name}
	t.connections.AddTable(gone)
	t.connections.DelTable(gone)
}

// table is the node's nftables table, as it is being written. Of each family it has
//
//	hook                    rule
//	refuse, refuse-output   protocol . address . port in empty-4 → refuse
//	nat, nat-output         protocol . address . port in services-4 → goto one-of-N, N being the number of backends
//	nat, nat-output         before that: protocol . address . port in masked-4 → mark
//	one-of-N                protocol . address . port . random number below N in backends-4 → dnat
//	hairpin                 what is marked → snat to the node's address
//	hairpin                 a backend that reached itself → snat to the node's address, else its answer would not come back by here
//
// so that there are as many rules for 10,000 Services as for one.
type table struct {
	connections *nftables.Conn
	table       *nftables.Table
	hooks       map[string]*nftables.Chain
	sets        map[string]*nftables.Set
}

func openTable(name string) (*table, error) {
	// One transaction is one message as far as the socket is concerned, and each part of it is acknowledged.
	const room = 4 << 20
	c, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(room), c.SetReadBuffer(room)) // an ordinary user gets less, which is no error
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return &table{connections: c, table: &nftables.Table{Family: nftables.TableFamilyINet, Name: name},
		hooks: map[string]*nftables.Chain{}, sets: map[string]*nftables.Set{}}, nil
}

// hook returns the base chain of that name, which both families share.
func (t *table) hook(name string, kind nftables.ChainType, at *nftables.ChainHook, priority nftables.ChainPriority) *nftables.Chain {
	if t.hooks[name] == nil {
		t.hooks[name] = t.connections.AddChain(&nftables.Chain{Name: name, Table: t.table, Type: kind, Hooknum: at, Priority: &priority})
	}
	return t.hooks[name]
}

func (t *table) rule(chain *nftables.Chain, parts ...[]expr.Any) {
	t.connections.AddRule(&nftables.Rule{Table: t.table, Chain: chain, Exprs: slices.Concat(parts...)})
}

func (t *table) chain(name string) *nftables.Chain {
	return t.connections.AddChain(&nftables.Chain{Name: name, Table: t.table})
}

// family is where IPv4 and IPv6 differ.
type family struct {
	suffix              string
	nfproto             byte
	kind                nftables.SetDatatype
	source, destination uint32 // offsets in the IP header
	bytes               uint32
}

var (
	ipv4 = family{"4", unix.NFPROTO_IPV4, nftables.TypeIPAddr, 12, 16, 4}
	ipv6 = family{"6", unix.NFPROTO_IPV6, nftables.TypeIP6Addr, 8, 24, 16}
)

// register is the first of the sixteen 4-byte registers, in which the parts of a key stand one after the other.
const register = unix.NFT_REG32_00

func (f family) only() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{f.nfproto}},
	}
}

// key loads protocol . destination address . destination port.
func (f family) key() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		&expr.Payload{DestRegister: register + 1, Base: expr.PayloadBaseNetworkHeader, Offset: f.destination, Len: f.bytes},
		&expr.Payload{DestRegister: register + 1 + f.bytes/4, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

// keyOf is the same as bytes of a set element.
func (f family) keyOf(s Service) []byte {
	key := append([]byte{byte(s.Protocol), 0, 0, 0}, s.Addr.Addr().AsSlice()...)
	return append(key, portBytes(s.Addr.Port())...)
}

func portBytes(port uint16) []byte { return append(binary.BigEndian.AppendUint16(nil, port), 0, 0) }

// family writes what concerns the Services of one family.
func (t *table) family(f family, services []Service) error {
	portKey := nftables.MustConcatSetType(nftables.TypeInetProto, f.kind, nftables.TypeInetService)
	empty := &nftables.Set{Table: t.table, Name: "empty-" + f.suffix, KeyType: portKey}
	chosen := &nftables.Set{Table: t.table, Name: "services-" + f.suffix, KeyType: portKey, IsMap: true, DataType: nftables.TypeVerdict}
	backends := &nftables.Set{Table: t.table, Name: "backends-" + f.suffix, IsMap: true,
		KeyType:  nftables.MustConcatSetType(nftables.TypeInetProto, f.kind, nftables.TypeInetService, nftables.TypeInteger),
		DataType: nftables.MustConcatSetType(f.kind, nftables.TypeInetService)}
	itself := &nftables.Set{Table: t.table, Name: "itself-" + f.suffix, KeyType: nftables.MustConcatSetType(f.kind, f.kind)}
	masked := &nftables.Set{Table: t.table, Name: "masked-" + f.suffix, KeyType: portKey}
	sets := []*nftables.Set{empty, chosen, backends, itself, masked}
	for _, s := range sets {
		t.sets[s.Name] = s
		if err := t.connections.AddSet(s, nil); err != nil {
			return err
		}
	}

	elements := map[*nftables.Set][]nftables.SetElement{}
	oneOf := map[int]string{}
	selves := map[netip.Addr]bool{}
	for _, s := range services {
		if s.Addr.Addr().BitLen() != int(f.bytes)*8 {
			continue
		}
		key, count := f.keyOf(s), len(s.Backends)
		if s.Masqueraded {
			elements[masked] = append(elements[masked], nftables.SetElement{Key: key})
		}
		if count == 0 {
			elements[empty] = append(elements[empty], nftables.SetElement{Key: key})
			continue
		}
		if oneOf[count] == "" {
			oneOf[count] = fmt.Sprintf("one-of-%d-%s", count, f.suffix)
			t.oneOf(f, oneOf[count], count, backends)
		}
		elements[chosen] = append(elements[chosen], nftables.SetElement{Key: key,
			VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: oneOf[count]}})
		for i, b := range s.Backends {
			elements[backends] = append(elements[backends], nftables.SetElement{
				Key: append(slices.Clone(key), binaryutil.NativeEndian.PutUint32(uint32(i))...), // numgen counts in the machine's own order
				Val: append(b.Addr().AsSlice(), portBytes(b.Port())...)})
			if !selves[b.Addr()] {
				selves[b.Addr()] = true
				elements[itself] = append(elements[itself], nftables.SetElement{Key: append(b.Addr().AsSlice(), b.Addr().AsSlice()...)})
			}
		}
	}
	if err := t.connections.Flush(); err != nil {
		return err
	}
	waiting := 0
	for _, s := range sets {
		for part := range slices.Chunk(elements[s], elementsPerMessage) {
			if waiting += len(part); waiting > elementsPerFlush {
				if err := t.connections.Flush(); err != nil {
					return err
				}
				waiting = len(part)
			}
			if err := t.connections.SetAddElements(s, part); err != nil {
				return err
			}
		}
	}
	return t.connections.Flush()
}

const (
	// The length of an attribute, which the elements of a message are, has 16 bits; an element takes up to 130 bytes.
	elementsPerMessage = 256
	// What an ordinary user's socket takes in one transaction, with the default net.core.wmem_max.
	elementsPerFlush = 1024
)

// mark is that of the first packets of connections that are to come from the node's address.
var mark = binaryutil.NativeEndian.PutUint32(0x6d71)

// hookUp sends packets to the sets from the node's hooks: those of pods on arrival, the node's own on departure.
func (t *table) hookUp(f family, node netip.Addr) {
	empty, chosen, itself, masked := t.sets["empty-"+f.suffix], t.sets["services-"+f.suffix], t.sets["itself-"+f.suffix], t.sets["masked-"+f.suffix]
	refuse := t.chain("refuse-" + f.suffix)
	t.rule(refuse, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Reject{Type: unix.NFT_REJECT_TCP_RST},
	})
	t.rule(refuse, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}})

	const beforeNAT = nftables.ChainPriority(-110)
	isEmpty := []expr.Any{&expr.Lookup{SourceRegister: register, SetName: empty.Name, SetID: empty.ID},
		&expr.Verdict{Kind: expr.VerdictGoto, Chain: refuse.Name}}
	choose := []expr.Any{&expr.Lookup{SourceRegister: register, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: chosen.Name, SetID: chosen.ID}}
	for _, at := range []struct {
		suffix string
		hook   *nftables.ChainHook
	}{{"", nftables.ChainHookPrerouting}, {"-output", nftables.ChainHookOutput}} {
		t.rule(t.hook("refuse"+at.suffix, nftables.ChainTypeFilter, at.hook, beforeNAT), f.only(), f.key(), isEmpty)
		nat := t.hook("nat"+at.suffix, nftables.ChainTypeNAT, at.hook, *nftables.ChainPriorityNATDest)
		t.rule(nat, f.only(), f.key(), []expr.Any{
			&expr.Lookup{SourceRegister: register, SetName: masked.Name, SetID: masked.ID},
			&expr.Immediate{Register: register, Data: mark},
			&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: register},
		})
		t.rule(nat, f.only(), f.key(), choose)
	}
	toNode := []expr.Any{
		&expr.Immediate{Register: register, Data: node.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.nfproto), RegAddrMin: register},
	}
	hairpin := t.hook("hairpin", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, *nftables.ChainPriorityNATSource)
	t.rule(hairpin, f.only(), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: mark},
	}, toNode)

	t.rule(hairpin, f.only(), []expr.Any{
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: f.source, Len: f.bytes},
		&expr.Payload{DestRegister: register + f.bytes/4, Base: expr.PayloadBaseNetworkHeader, Offset: f.destination, Len: f.bytes},
		&expr.Lookup{SourceRegister: register, SetName: itself.Name, SetID: itself.ID},
	}, toNode)
}

// oneOf makes the chain that sends a connection to one of so many backends.
func (t *table) oneOf(f family, name string, count int, backends *nftables.Set) {
	t.rule(t.chain(name), f.key(), []expr.Any{
		&expr.Numgen{Register: register + 2 + f.bytes/4, Modulus: uint32(count), Type: unix.NFT_NG_RANDOM},
		&expr.Lookup{SourceRegister: register, DestRegister: register, IsDestRegSet: true, SetName: backends.Name, SetID: backends.ID},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.nfproto), RegAddrMin: register, RegProtoMin: register + f.bytes/4, Specified: true},
	})
}

// rejectUnknown answers at once for addresses that nobody has.
func (t *table) rejectUnknown() {
	toVoid := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append([]byte(void), make([]byte, unix.IFNAMSIZ-len(void))...)},
	}
	unreachable := []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_HOST_UNREACH}}
	// In the output hook a packet that was translated a moment ago still shows the old way out.
	const ipsDstNAT = 1 << 5
	translated := []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(ipsDstNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
	t.rule(t.hook("unknown", nftables.ChainTypeFilter, nftables.ChainHookForward, *nftables.ChainPriorityFilter), toVoid, unreachable)
	output := t.hook("unknown-output", nftables.ChainTypeFilter, nftables.ChainHookOutput, *nftables.ChainPriorityFilter)
	t.rule(output, translated)
	t.rule(output, toVoid, unreachable)
}
