package packet

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/google/nftables"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// Table is the table in the network namespace of the thread that first uses it. One goroutine at a time may use it; nobody else may write
// the table beside it, but see [netfilter.Guard].
type Table struct {
	logger  *slog.Logger
	conn    *netfilter.Conn
	written *Ruleset // what the kernel took last from here, but for the peers, whose names say enough; nil: there is no telling what it has
}

// OpenTable returns a table that nothing has been written to. There may be one already.
func OpenTable(logger *slog.Logger) *Table { return &Table{logger: logger, conn: Open()} }

// Apply enforces a packet policy in place of the one before, in one transaction that holds only what differs from what was written last. Where it
// fails, the one before stays in force.
func (t *Table) Apply(p *verdict.Packets) error {
	next, err := Emit(p, names.ProxyMark)
	if err != nil {
		return err
	}
	before := t.written
	t.written = nil
	if before != nil {
		if err = t.conn.Do(func(conn *nftables.Conn) error { return next.change(conn, before) }); err != nil { // somebody may have changed what that rests on
			t.logger.Warn("packets: the table cannot be changed, writing all of it", "table", TableName, "cause", err)
		}
	}
	if before == nil || err != nil {
		if err = next.Apply(t.conn); err != nil {
			return err
		}
	}
	next.forgetPeers()
	t.written = next
	return nil
}

// forgetPeers lets go of the peers' addresses, of which there may be ten thousands.
func (rs *Ruleset) forgetPeers() {
	for i := range rs.Sets {
		if s := &rs.Sets[i]; s.ofPeers() {
			s.Elements = nil
		}
	}
}

// Rewrite is Apply for a table that somebody else has changed: all of it is written.
func (t *Table) Rewrite(p *verdict.Packets) error {
	t.written = nil
	return t.Apply(p)
}

// Check reads the table back from the kernel, as the function of that name does.
func (t *Table) Check(p *verdict.Packets) error { return Check(t.conn, p) }

// There reports whether there is the table, in whatever state.
func (t *Table) There() (bool, error) { return There(t.conn) }

// Wrote reports whether a transaction was this table's, by the netlink port that it came from.
func (t *Table) Wrote(port uint32) bool { return t.conn.Wrote(port) }

// Close closes the connection to the kernel. What is in force stays.
func (t *Table) Close() { t.conn.Close() }

// errAnew says that a table cannot be made another one piece by piece.
var errAnew = errors.New("packets: what differs cannot be changed in place")

// change makes the table that was written before this one, in one transaction. Chains and sets of the same name are the same or, if they are
// not those of peers and endpoints, get other rules and elements where they are: the rules of all chains change at the same moment, and so do
// the elements of all sets, but a packet that is in between the two can meet old rules with new elements. Of those only the maps of
// ports and services have any, and the node ports that no reply goes to; each of their elements leads to what one of the two policies has for that port.
func (rs *Ruleset) change(conn *nftables.Conn, before *Ruleset) error {
	sets, chains := map[string]*Set{}, map[string]*Chain{}
	for i := range before.Sets {
		sets[before.Sets[i].Name] = &before.Sets[i]
	}
	for i := range before.Chains {
		chains[before.Chains[i].Name] = &before.Chains[i]
	}
	var newChains, newRules []Chain
	for _, c := range rs.Chains {
		was := chains[c.Name]
		delete(chains, c.Name)
		if was == nil {
			newChains, newRules = append(newChains, c), append(newRules, c)
			continue
		}
		same, err := netfilter.SameRules(was.Rules, c.Rules)
		if err != nil {
			return err
		}
		if !same {
			conn.FlushChain(c.Chain)
			newRules = append(newRules, c)
		}
	}
	for _, c := range before.Chains { // what is left of the map, in an order that is always the same
		if chains[c.Name] != nil {
			conn.FlushChain(c.Chain)
		}
	}
	var newSets, newElements []*Set
	for i := range rs.Sets {
		s := &rs.Sets[i]
		was := sets[s.Name]
		delete(sets, s.Name)
		switch {
		case was == nil:
			newSets, newElements = append(newSets, s), append(newElements, s)
		case !sameKind(was, s):
			return errAnew
		case !s.ofPeers() && !slices.EqualFunc(was.Elements, s.Elements, sameElement):
			conn.FlushSet(s.Set)
			newElements = append(newElements, s)
		}
	}
	for i := range before.Sets {
		if s := &before.Sets[i]; sets[s.Name] != nil {
			conn.DelSet(s.Set)
		}
	}
	for _, c := range before.Chains {
		if chains[c.Name] != nil {
			conn.DelChain(c.Chain)
		}
	}
	for _, c := range newChains { // first all of them, without rules: maps and rules name chains
		conn.AddChain(c.Chain)
	}
	for _, s := range newSets {
		if err := conn.AddSet(s.Set, nil); err != nil {
			return fmt.Errorf("set %s: %w", s.Name, err)
		}
	}
	for _, s := range newElements {
		if err := s.addElements(conn); err != nil {
			return err
		}
	}
	netfilter.AddRules(conn, newRules)
	return conn.Flush()
}

// ofPeers reports whether the name of a set stands for what it holds.
func (s *Set) ofPeers() bool { return strings.HasPrefix(s.Name, peersPrefix) }

func sameKind(a, b *Set) bool {
	return a.IsMap == b.IsMap && a.Interval == b.Interval && a.KeyType == b.KeyType && a.DataType == b.DataType
}

func sameElement(a, b nftables.SetElement) bool {
	return bytes.Equal(a.Key, b.Key) && bytes.Equal(a.Val, b.Val) && a.IntervalEnd == b.IntervalEnd &&
		(a.VerdictData == nil) == (b.VerdictData == nil) && (a.VerdictData == nil || *a.VerdictData == *b.VerdictData)
}
