package packet

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

const (
	// elementsPerMessage keeps a message's list of elements (at most 64 octets each, twice that for a verdict) under the 64 KiB that a
	// netlink attribute can hold.
	elementsPerMessage = 400
	// sendBuffer holds a whole transaction, which netlink takes in one piece: about half a million intervals.
	sendBuffer = 64 << 20
)

// Open returns a connection for [Apply], [Check] and [There], with a send buffer beyond what the system allows, which takes CAP_NET_ADMIN outside user
// namespaces; otherwise it is content with what the system allows.
func Open() *netfilter.Conn {
	return netfilter.NewConn(nftables.WithSockOptions(func(c *netlink.Conn) error { return c.SetWriteBuffer(sendBuffer) }))
}

// Apply enforces a packet policy in the network namespace of the connection, in one transaction, in place of the one before. Where it
// fails, the one before stays in force. Packets marked names.ProxyMark pass at egress.
func Apply(conn *netfilter.Conn, p *verdict.Packets) error {
	rs, err := Emit(p, names.ProxyMark)
	if err != nil {
		return err
	}
	return rs.Apply(conn)
}

// Apply writes the table, whether or not there is one already. The base chains stay where they are and only their rules are replaced: a
// new base chain would come before the old one in the hook, and a packet between the two at the moment of the commit would pass the new one
// while that has no rules yet and the old one when that has none any more. Nobody else may write the table at the same time.
func (rs *Ruleset) Apply(conn *netfilter.Conn) error {
	switch err := conn.Do(rs.write); {
	case errors.Is(err, unix.EMSGSIZE):
		return fmt.Errorf("packets: write table inet %s: the policy is larger than the kernel takes at once (raise net.core.wmem_max): %w", TableName, err)
	case err != nil:
		return fmt.Errorf("packets: write table inet %s (needs CAP_NET_ADMIN and nf_tables with conntrack in the kernel): %w", TableName, err)
	}
	return nil
}

func (rs *Ruleset) write(conn *nftables.Conn) error {
	if err := rs.clear(conn); err != nil {
		return err
	}
	for _, c := range rs.Chains { // first all of them, without rules: maps and rules name chains
		conn.AddChain(c.Chain)
	}
	for i := range rs.Sets {
		s := &rs.Sets[i]
		if err := conn.AddSet(s.Set, nil); err != nil {
			return fmt.Errorf("set %s: %w", s.Name, err)
		}
		if err := s.addElements(conn); err != nil {
			return err
		}
	}
	netfilter.AddRules(conn, rs.Chains)
	return conn.Flush()
}

func (s *Set) addElements(conn *nftables.Conn) error {
	for elements := range slices.Chunk(s.Elements, elementsPerMessage) {
		if err := conn.SetAddElements(s.Set, elements); err != nil {
			return fmt.Errorf("elements of set %s: %w", s.Name, err)
		}
	}
	return nil
}

// clear adds the table, and to the same transaction what empties the one that there is, but for base chains that stay.
func (rs *Ruleset) clear(conn *nftables.Conn) error {
	tables, err := conn.ListTablesOfFamily(rs.Table.Family)
	if err != nil {
		return fmt.Errorf("read tables: %w", err)
	}
	conn.AddTable(rs.Table)
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == rs.Table.Name })
	if i < 0 {
		return nil
	}
	if tables[i].Flags != 0 { // somebody has put it to sleep
		conn.DelTable(rs.Table)
		conn.AddTable(rs.Table)
		return nil
	}
	chains, err := conn.ListChainsOfTableFamily(rs.Table.Family)
	if err != nil {
		return fmt.Errorf("read chains: %w", err)
	}
	sets, err := conn.GetSets(rs.Table)
	if err != nil {
		return fmt.Errorf("read sets: %w", err)
	}
	conn.FlushTable(rs.Table)
	for _, s := range sets {
		conn.DelSet(s)
	}
	for _, c := range chains {
		if c.Table.Name == rs.Table.Name && !rs.keeps(c) {
			conn.DelChain(c)
		}
	}
	return nil
}

// keeps reports whether a chain of the kernel is one of the base chains, at the same hook.
func (rs *Ruleset) keeps(c *nftables.Chain) bool {
	return slices.ContainsFunc(rs.Chains, func(w Chain) bool {
		return w.Hooknum != nil && w.Name == c.Name && c.Hooknum != nil && *c.Hooknum == *w.Hooknum && c.Type == w.Type &&
			c.Priority != nil && *c.Priority == *w.Priority
	})
}

// Remove deletes the table: UDP and SCTP then pass unjudged. It is no error if there is no table.
func Remove(conn *netfilter.Conn) error {
	err := conn.Do(func(conn *nftables.Conn) error {
		conn.DelTable(&nftables.Table{Name: TableName, Family: nftables.TableFamilyINet})
		return conn.Flush()
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("packets: delete table inet %s: %w", TableName, err)
	}
	return nil
}
