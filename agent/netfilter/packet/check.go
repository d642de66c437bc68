package packet

import (
	"fmt"
	"slices"

	"github.com/google/nftables"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// Check reads the table back from the kernel and fails where it is not what Apply writes for a policy: a chain, a rule or a set is missing,
// changed, added or in another place. Elements of sets are not read: they can be many.
func Check(conn *netfilter.Conn, p *verdict.Packets) error {
	rs, err := Emit(p, names.ProxyMark)
	if err != nil {
		return err
	}
	l := netfilter.Layout{Table: TableName, Chains: rs.Chains}
	for _, s := range rs.Sets {
		l.Sets = append(l.Sets, s.Name)
	}
	if err := l.Check(conn); err != nil {
		return fmt.Errorf("packets: %w", err)
	}
	return nil
}

// There reports whether there is the table, in whatever state.
func There(conn *netfilter.Conn) (there bool, err error) {
	err = conn.Do(func(conn *nftables.Conn) error {
		tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
		there = slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == TableName })
		return err
	})
	if err != nil {
		return false, fmt.Errorf("packets: read tables: %w", err)
	}
	return there, nil
}
