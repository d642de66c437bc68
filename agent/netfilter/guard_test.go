package netfilter

import (
	"context"
	"errors"
	"log/slog"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"go.uber.org/goleak"
)

// counted is a guarded table that tells of each check, and is broken as long as the test wants.
type counted struct {
	name    string
	checked chan bool
	broken  chan bool // one for each check: is it?
	repairs int
	own     *Conn
}

func (c *counted) Wrote(port uint32) bool { return c.own != nil && c.own.Wrote(port) }

func (c *counted) Name() string { return c.name }

func (c *counted) Check() error {
	c.checked <- true
	if <-c.broken {
		return errors.New("not as it should be")
	}
	return nil
}

func (c *counted) Repair() error { c.repairs++; return nil }

// answer lets one check go on.
func (c *counted) answer(broken bool) {
	<-c.checked
	c.broken <- broken
}

// transact is one nftables transaction.
func transact(t *testing.T, do func(c *nftables.Conn)) {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	do(conn)
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
}

// Guard looks at a table when a transaction touches its rules, chains or sets, and neither at elements nor at what others write: verdicts on
// destinations come by the thousand.
func TestGuardLooksAtWhatWasTouched(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	tables := map[string]*nftables.Table{}
	for _, name := range []string{"one", "two", "stranger"} {
		table := &nftables.Table{Name: name, Family: nftables.TableFamilyINet}
		tables[name] = table
		transact(t, func(c *nftables.Conn) { c.AddTable(table) })
		t.Cleanup(func() { transact(t, func(c *nftables.Conn) { c.DelTable(table) }) })
	}
	namesake := &nftables.Table{Name: "two", Family: nftables.TableFamilyIPv4}
	set := &nftables.Set{Table: tables["one"], Name: "set", KeyType: nftables.TypeInetService}
	transact(t, func(c *nftables.Conn) {
		if err := c.AddSet(set, nil); err != nil {
			t.Error(err)
		}
		c.AddTable(namesake)
	})
	t.Cleanup(func() { transact(t, func(c *nftables.Conn) { c.DelTable(namesake) }) })

	one := &counted{name: "one", checked: make(chan bool), broken: make(chan bool)}
	two := &counted{name: "two", checked: make(chan bool), broken: make(chan bool)}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Guard(ctx, slog.New(slog.DiscardHandler), one, two) }()
	one.answer(false)
	two.answer(false)

	chain := func(of *nftables.Table) *nftables.Chain { return &nftables.Chain{Name: "chain", Table: of} }
	for i := range 200 {
		transact(t, func(c *nftables.Conn) {
			key := []nftables.SetElement{{Key: []byte{byte(i), 1}}}
			if err := errors.Join(c.SetAddElements(set, key), c.SetDeleteElements(set, key)); err != nil {
				t.Error(err)
			}
		})
	}
	transact(t, func(c *nftables.Conn) { c.AddChain(chain(tables["stranger"])); c.AddChain(chain(namesake)) })
	transact(t, func(c *nftables.Conn) {
		c.AddChain(chain(tables["two"]))
		c.AddRule(&nftables.Rule{Table: tables["two"], Chain: chain(tables["two"]), Exprs: []expr.Any{&expr.Counter{}}})
	})
	own := NewConn()
	defer own.Close()
	one.own = own
	if err := own.Do(func(c *nftables.Conn) error {
		c.AddChain(chain(tables["one"]))
		return c.Flush()
	}); err != nil {
		t.Fatal(err)
	}
	// Events come in order: what would have been looked at for the transactions before would be looked at first.
	select {
	case <-one.checked:
		t.Fatal("elements, what others write, or what the owner does, have a table looked at")
	case <-two.checked:
		two.broken <- true
		two.answer(false) // after its repair
	}
	transact(t, func(c *nftables.Conn) { c.FlushRuleset() })
	one.answer(false)
	two.answer(false)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if one.repairs != 0 || two.repairs != 1 {
		t.Errorf("%d and %d repairs, not 0 and 1", one.repairs, two.repairs)
	}
	for _, table := range append([]*nftables.Table{namesake}, tables["one"], tables["two"], tables["stranger"]) { // for the cleanups
		transact(t, func(c *nftables.Conn) { c.AddTable(table) })
	}
}

// A repair that does not help ends Guard: the pod must not count as enforced.
func TestGuardGivesUp(t *testing.T) {
	c := &counted{name: "one", checked: make(chan bool), broken: make(chan bool)}
	ended := make(chan error, 1)
	go func() { ended <- Guard(t.Context(), slog.New(slog.DiscardHandler), c) }()
	c.answer(true)
	c.answer(true)
	if err := <-ended; err == nil {
		t.Error("no error")
	}
}
