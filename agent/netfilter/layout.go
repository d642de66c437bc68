package netfilter

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Layout is what a table of the family inet is made of. What its sets hold is not part of it.
type Layout struct {
	Table  string
	Chains []Chain
	Sets   []string // names, in any order; anonymous ones not counted
}

// Chain is a chain with its rules. A base chain names its hook.
type Chain struct {
	*nftables.Chain
	Rules [][]expr.Any
}

// Check reads the table back and fails where it is not as laid out: asleep, or with a chain, a rule or a set that is missing, changed,
// added or in another place.
func (l Layout) Check(conn *Conn) error {
	if err := conn.Do(l.check); err != nil {
		return fmt.Errorf("table inet %s: %w", l.Table, err)
	}
	return nil
}

func (l Layout) check(conn *nftables.Conn) error {
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("read tables: %w", err)
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == l.Table })
	if i < 0 {
		return fmt.Errorf("it is gone")
	}
	if tables[i].Flags != 0 {
		return fmt.Errorf("it has flags %#x (dormant?), not 0", tables[i].Flags)
	}
	chains, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("read chains: %w", err)
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != l.Table })
	if len(chains) != len(l.Chains) {
		return fmt.Errorf("it has %d chains, not %d", len(chains), len(l.Chains))
	}
	for _, w := range l.Chains {
		i := slices.IndexFunc(chains, func(c *nftables.Chain) bool { return c.Name == w.Name })
		if i < 0 {
			return fmt.Errorf("chain %s is gone", w.Name)
		}
		if err := w.check(conn, chains[i]); err != nil {
			return fmt.Errorf("chain %s: %w", w.Name, err)
		}
	}
	return l.checkSets(conn, tables[i])
}

func (l Layout) checkSets(conn *nftables.Conn, t *nftables.Table) error {
	sets, err := conn.GetSets(t)
	if err != nil {
		return fmt.Errorf("read sets: %w", err)
	}
	var got []string
	for _, s := range sets {
		if !s.Anonymous {
			got = append(got, s.Name)
		}
	}
	want := slices.Sorted(slices.Values(l.Sets))
	slices.Sort(got)
	if !slices.Equal(got, want) {
		return fmt.Errorf("it has the sets %q, not %q", got, want)
	}
	return nil
}

// check compares the chain with the one that the kernel has.
func (w Chain) check(conn *nftables.Conn, got *nftables.Chain) error {
	if w.Hooknum != nil {
		switch {
		case got.Type != w.Type || got.Hooknum == nil || *got.Hooknum != *w.Hooknum:
			return fmt.Errorf("it is not the %s chain of its hook", w.Type)
		case got.Priority == nil || *got.Priority != *w.Priority:
			return fmt.Errorf("it does not have priority %d", *w.Priority)
		case got.Policy == nil || *got.Policy != *w.Policy:
			return fmt.Errorf("it does not have policy %d", *w.Policy)
		}
	}
	rules, err := conn.GetRules(got.Table, got)
	if err != nil {
		return fmt.Errorf("read rules: %w", err)
	}
	if len(rules) != len(w.Rules) {
		return fmt.Errorf("it has %d rules, not %d", len(rules), len(w.Rules))
	}
	for i, rule := range rules {
		same, err := sameExprs(rule.Exprs, w.Rules[i])
		if err != nil {
			return fmt.Errorf("rule %d: %w", i+1, err)
		}
		if !same {
			return fmt.Errorf("rule %d is not what was written", i+1)
		}
	}
	return nil
}

// AddRules adds the rules of chains, which are there or come with the same transaction, to it.
func AddRules(conn *nftables.Conn, chains []Chain) {
	for _, c := range chains {
		for _, exprs := range c.Rules {
			conn.AddRule(&nftables.Rule{Table: c.Table, Chain: c.Chain, Exprs: exprs})
		}
	}
}

// SameRules reports whether two lists of rules would be the same to the kernel. The error is of a rule that it would not take.
func SameRules(a, b [][]expr.Any) (bool, error) {
	if len(a) != len(b) {
		return false, nil
	}
	for i := range a {
		if same, err := sameExprs(a[i], b[i]); err != nil || !same {
			return false, err
		}
	}
	return true, nil
}

// sameExprs compares by what would go to the kernel.
func sameExprs(a, b []expr.Any) (bool, error) {
	if len(a) != len(b) {
		return false, nil
	}
	for i := range a {
		x, err := expr.Marshal(byte(nftables.TableFamilyINet), lasting(a[i]))
		if err != nil {
			return false, err
		}
		y, err := expr.Marshal(byte(nftables.TableFamilyINet), lasting(b[i]))
		if err != nil {
			return false, err
		}
		if !bytes.Equal(x, y) {
			return false, nil
		}
	}
	return true, nil
}

// lasting leaves out what is not read back: the number of a set, which means something only in the transaction that makes the set, and the
// register from which something of a flow is set, which the library does not read.
func lasting(e expr.Any) expr.Any {
	switch e := e.(type) {
	case *expr.Lookup:
		c := *e
		c.SetID = 0
		return &c
	case *expr.Ct:
		if e.SourceRegister {
			return &expr.Ct{Key: e.Key}
		}
	case *expr.Dynset:
		c := *e
		c.SetID = 0
		return &c
	}
	return e
}
