package hold

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/verdict"
)

// shape is what the table is made of: all but the verdicts on destinations inside the cluster. It has a connection of its own, so that
// writing many addresses does not wait for answers, nor answers for it longer than the kernel takes for one transaction.
type shape struct {
	logger *slog.Logger
	sets   [2]sets

	checking *netfilter.Conn
	port     *atomic.Uint32 // of conn

	mu         sync.Mutex // all below
	conn       *nftables.Conn
	cfg        Config
	holding    bool
	generation int
	sides      [2]outside // external, inbound
}

// outside is what is in force for one direction.
type outside struct {
	direction
	rulings []ruling
	judging judging
}

func newShape(c Config, s [2]sets, logger *slog.Logger) (*shape, error) {
	port := &atomic.Uint32{}
	conn, err := dial(netfilter.WithPort(port))
	if err != nil {
		return nil, err
	}
	return &shape{port: port, logger: logger, sets: s, checking: netfilter.NewConn(), conn: conn, cfg: c, holding: true, sides: [2]outside{
		{direction: external, rulings: rulings(&c.External)}, {direction: inbound, rulings: rulings(&c.Inbound)}}}, nil
}

// Shut writes the table so that all of the app's connections are refused, and all from outside: for the time before a Holder can be opened. Of
// the configuration only ProxyMark and Users count.
func Shut(c Config) error {
	c.Cluster, c.Exempt, c.Services, c.External, c.Inbound = nil, nil, nil, verdict.Table{}, verdict.Table{}
	s, err := newShape(c, newSets(c), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	defer s.close()
	return s.write(true)
}

func (s *shape) close() {
	_ = s.conn.CloseLasting()
	s.checking.Close()
}

// write writes the table, without any verdict on destinations inside the cluster, in one transaction and in place of any that is there.
func (s *shape) write(holding bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holding = holding
	s.generation++
	for i := range s.sides {
		s.sides[i].judging = s.judge(&s.sides[i])
	}
	err := s.writeAll()
	if errors.Is(err, unix.EMSGSIZE) {
		for i := range s.sides {
			s.tooMany(&s.sides[i], err)
		}
		err = s.writeAll()
	}
	if err != nil {
		return fmt.Errorf("hold: write table inet %s (needs CAP_NET_ADMIN and nf_tables with reject, since Linux 5.9 also in prerouting, and log): %w", TableName, err)
	}
	return nil
}

func (s *shape) writeAll() error {
	// Adding a table that exists changes nothing, deleting one that does not is an error: so add, delete, add.
	s.conn.AddTable(table())
	s.conn.DelTable(table())
	s.conn.AddTable(table())
	for _, f := range s.sets {
		for _, set := range []*nftables.Set{f.allowed, f.denied, f.used, f.services} {
			if err := s.conn.AddSet(set, nil); err != nil {
				return fmt.Errorf("set %s: %w", set.Name, err)
			}
		}
	}
	if err := s.eachServices(s.conn.SetAddElements, s.cfg.Services); err != nil {
		return err
	}
	for i := range s.sides {
		if err := addSets(s.conn, s.sides[i].judging.sets); err != nil {
			return err
		}
	}
	list := s.chains()
	for _, c := range list { // first all of them, without rules: rules name chains
		s.conn.AddChain(c.Chain)
	}
	netfilter.AddRules(s.conn, list)
	return s.conn.Flush()
}

// chains are all chains of the table.
func (s *shape) chains() []netfilter.Chain {
	return slices.Concat(chains(s.cfg, s.sets, s.holding), s.sides[0].judging.chains, s.sides[1].judging.chains)
}

// judge makes what the kernel gets of a direction, if that is not too much.
func (s *shape) judge(of *outside) judging {
	if n := size(of.rulings); n > s.cfg.MaxOutside {
		s.tooMany(of, fmt.Errorf("%d ranges of addresses and ports, more than %d", n, s.cfg.MaxOutside))
		return of.judging
	}
	return of.judge(of.rulings, s.generation)
}

func (s *shape) tooMany(of *outside, why error) {
	s.logger.Warn("hold: the policy names more addresses outside the cluster than are held here: connections go on to Envoy, which accepts and then closes denied ones",
		"direction", of.name, "cause", why)
	of.judging = of.pass()
}

// replace puts a table in force for one direction. First what is new is written and led to, in one transaction; then what nothing leads to
// any more is deleted. In one transaction a packet on its way through the old rules could find the old sets empty.
func (s *shape) replace(i int, t *verdict.Table) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	of := &s.sides[i]
	list := rulings(t)
	if slices.EqualFunc(list, of.rulings, ruling.equal) {
		return nil
	}
	before := of.judging
	of.rulings = list
	s.generation++
	of.judging = s.judge(of)
	err := s.lead(of.judging)
	if errors.Is(err, unix.EMSGSIZE) {
		s.tooMany(of, err)
		err = s.lead(of.judging)
	}
	if err != nil {
		return fmt.Errorf("hold: write the addresses outside the cluster (%s): %w", of.name, err)
	}
	for _, c := range before.chains[1:] {
		s.conn.FlushChain(c.Chain)
		s.conn.DelChain(c.Chain)
	}
	for _, set := range before.sets {
		s.conn.DelSet(set.Set)
	}
	if err := s.conn.Flush(); err != nil {
		return fmt.Errorf("hold: delete former addresses outside the cluster (%s): %w", of.name, err)
	}
	return nil
}

// serve puts other external addresses of services in force. Those that stay are not touched, so that a packet finds them at any time.
func (s *shape) serve(services []netip.AddrPort) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := map[netip.AddrPort]bool{}
	for _, a := range s.cfg.Services {
		before[a] = true
	}
	var come, gone []netip.AddrPort
	for _, a := range services {
		if !before[a] {
			come = append(come, a)
		}
		delete(before, a)
	}
	for a := range before {
		gone = append(gone, a)
	}
	if len(come)+len(gone) == 0 {
		return nil
	}
	if err := errors.Join(s.eachServices(s.conn.SetAddElements, come), s.eachServices(s.conn.SetDeleteElements, gone)); err != nil {
		return err
	}
	if err := s.conn.Flush(); err != nil {
		return fmt.Errorf("hold: write %d and delete %d external addresses of services: %w", len(come), len(gone), err)
	}
	s.cfg.Services = slices.Clone(services)
	return nil
}

// eachServices puts elements of the sets of external addresses into the transaction, each into that of its family.
func (s *shape) eachServices(with func(*nftables.Set, []nftables.SetElement) error, services []netip.AddrPort) error {
	var elements [2][]nftables.SetElement
	for _, a := range services {
		f := familyOf(a.Addr())
		elements[f] = append(elements[f], nftables.SetElement{Key: key(a)})
	}
	for f := range elements {
		if err := inMessages(with, s.sets[f].services, elements[f]); err != nil {
			return err
		}
	}
	return nil
}

// lead adds chains and sets and has the first chain, which is there already, lead to them.
func (s *shape) lead(j judging) error {
	if err := addSets(s.conn, j.sets); err != nil {
		return err
	}
	for _, c := range j.chains[1:] {
		s.conn.AddChain(c.Chain)
	}
	s.conn.FlushChain(j.chains[0].Chain)
	netfilter.AddRules(s.conn, j.chains)
	return s.conn.Flush()
}

func addSets(conn *nftables.Conn, sets []addressSet) error {
	for _, set := range sets {
		if err := conn.AddSet(set.Set, nil); err != nil {
			return fmt.Errorf("set %s: %w", set.Name, err)
		}
		if err := inMessages(conn.SetAddElements, set.Set, set.elements); err != nil {
			return err
		}
	}
	return nil
}

// check compares the table with what was written.
func (s *shape) check() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := netfilter.Layout{Table: TableName, Chains: s.chains()}
	for _, f := range s.sets {
		l.Sets = append(l.Sets, f.allowed.Name, f.denied.Name, f.used.Name, f.services.Name)
	}
	for i := range s.sides {
		for _, set := range s.sides[i].judging.sets {
			l.Sets = append(l.Sets, set.Name)
		}
	}
	return l.Check(s.checking)
}
