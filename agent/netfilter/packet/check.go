package packet

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// Check reads the table back from the kernel and fails where it is not what Apply writes for a policy: a chain, a rule or a set is missing,
// changed, added or in another place. Elements of sets are not read: they can be many.
func Check(p *verdict.Packets) error {
	rs, err := Emit(p, names.ProxyMark)
	if err != nil {
		return err
	}
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("packets: open nftables: %w", err)
	}
	tables, err := conn.ListTablesOfFamily(rs.Table.Family)
	if err != nil {
		return fmt.Errorf("packets: read tables: %w", err)
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == TableName })
	if i < 0 {
		return fmt.Errorf("packets: table inet %s is gone", TableName)
	}
	if tables[i].Flags != 0 {
		return fmt.Errorf("packets: table inet %s has flags %#x (dormant?), not 0", TableName, tables[i].Flags)
	}
	return errors.Join(rs.checkSets(conn), rs.checkChains(conn))
}

func (rs *Ruleset) checkSets(conn *nftables.Conn) error {
	sets, err := conn.GetSets(rs.Table)
	if err != nil {
		return fmt.Errorf("packets: read sets: %w", err)
	}
	if len(sets) != len(rs.Sets) {
		return fmt.Errorf("packets: table inet %s has %d sets, not %d", TableName, len(sets), len(rs.Sets))
	}
	for _, w := range rs.Sets {
		if !slices.ContainsFunc(sets, func(s *nftables.Set) bool { return s.Name == w.Name && s.IsMap == w.IsMap && s.Interval == w.Interval }) {
			return fmt.Errorf("packets: set %s is gone", w.Name)
		}
	}
	return nil
}

func (rs *Ruleset) checkChains(conn *nftables.Conn) error {
	chains, err := conn.ListChainsOfTableFamily(rs.Table.Family)
	if err != nil {
		return fmt.Errorf("packets: read chains: %w", err)
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != TableName })
	if len(chains) != len(rs.Chains) {
		return fmt.Errorf("packets: table inet %s has %d chains, not %d", TableName, len(chains), len(rs.Chains))
	}
	for _, w := range rs.Chains {
		i := slices.IndexFunc(chains, func(c *nftables.Chain) bool { return c.Name == w.Name })
		if i < 0 {
			return fmt.Errorf("packets: chain %s is gone", w.Name)
		}
		got := chains[i]
		switch {
		case (w.Hooknum == nil) != (got.Hooknum == nil) || w.Hooknum != nil && !rs.keeps(got):
			return fmt.Errorf("packets: chain %s is not at its hook", w.Name)
		case w.Policy != nil && (got.Policy == nil || *got.Policy != *w.Policy):
			return fmt.Errorf("packets: chain %s does not have its policy", w.Name)
		}
		rules, err := conn.GetRules(rs.Table, got)
		if err != nil {
			return fmt.Errorf("packets: read chain %s: %w", w.Name, err)
		}
		if len(rules) != len(w.Rules) {
			return fmt.Errorf("packets: chain %s has %d rules, not %d", w.Name, len(rules), len(w.Rules))
		}
		for i, rule := range rules {
			same, err := sameExprs(rule.Exprs, w.Rules[i])
			if err != nil {
				return fmt.Errorf("packets: chain %s, rule %d: %w", w.Name, i+1, err)
			}
			if !same {
				return fmt.Errorf("packets: chain %s, rule %d is not what was written", w.Name, i+1)
			}
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
		x, err := canonical(a[i])
		if err != nil {
			return false, err
		}
		y, err := canonical(b[i])
		if err != nil {
			return false, err
		}
		if !bytes.Equal(x, y) {
			return false, nil
		}
	}
	return true, nil
}

// canonical is an expression as bytes, without what the library does not read back: the number that a set has within a transaction, and the
// register from which something of a flow is set.
func canonical(e expr.Any) ([]byte, error) {
	switch x := e.(type) {
	case *expr.Lookup:
		named := *x
		named.SetID = 0
		e = &named
	case *expr.Ct:
		if x.SourceRegister {
			e = &expr.Ct{Key: x.Key}
		}
	}
	return expr.Marshal(byte(nftables.TableFamilyINet), e)
}
