package hold

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// kernel writes the verdicts on destinations inside the cluster. It is not safe for concurrent use.
type kernel struct {
	conn *nftables.Conn
	sets [2]sets
}

// element is what the sets shall say about a destination. Without ttl they shall say nothing.
type element struct {
	dest    netip.AddrPort
	allowed bool
	ttl     time.Duration
}

func newKernel(c Config) (*kernel, error) {
	conn, err := dial()
	if err != nil {
		return nil, err
	}
	return &kernel{conn: conn, sets: newSets(c)}, nil
}

// dial opens a connection for the network namespace of the calling thread. One transaction may hold all elements, and gets an answer for
// each message: more than fits the default buffers. Where the system allows no more, it is content with that.
func dial(options ...nftables.ConnOption) (*nftables.Conn, error) {
	buffers := func(c *netlink.Conn) error { return errors.Join(c.SetReadBuffer(4<<20), c.SetWriteBuffer(16<<20)) }
	conn, err := nftables.New(append(options, nftables.AsLasting(), nftables.WithSockOptions(buffers))...)
	if err != nil {
		return nil, fmt.Errorf("hold: open nftables: %w", err)
	}
	return conn, nil
}

func (k *kernel) close() { _ = k.conn.CloseLasting() }

// write brings the elements in place, in one transaction. Deleting an element that has timed out would be an error: so each one is added,
// deleted, and added with its time.
func (k *kernel) write(elements []element) error {
	for f := range k.sets {
		for _, allowed := range []bool{true, false} {
			var all, wanted []nftables.SetElement
			for _, e := range elements {
				if familyOf(e.dest.Addr()) != f {
					continue
				}
				all = append(all, nftables.SetElement{Key: key(e.dest)})
				if e.ttl > 0 && e.allowed == allowed {
					wanted = append(wanted, nftables.SetElement{Key: key(e.dest), Timeout: e.ttl})
				}
			}
			set := k.sets[f].denied
			if allowed {
				set = k.sets[f].allowed
			}
			if err := errors.Join(
				inMessages(k.conn.SetAddElements, set, all),
				inMessages(k.conn.SetDeleteElements, set, all),
				inMessages(k.conn.SetAddElements, set, wanted),
			); err != nil {
				return err
			}
		}
	}
	if err := k.conn.Flush(); err != nil {
		return fmt.Errorf("hold: write %d elements: %w", len(elements), err)
	}
	return nil
}

// inMessages puts elements into the transaction, as many to a message as its 16 bits of length hold.
func inMessages(with func(*nftables.Set, []nftables.SetElement) error, s *nftables.Set, elements []nftables.SetElement) error {
	const most = 400
	for len(elements) > 0 {
		n := min(most, len(elements))
		if err := with(s, elements[:n]); err != nil {
			return fmt.Errorf("hold: set %s: %w", s.Name, err)
		}
		elements = elements[n:]
	}
	return nil
}

// used reads which allowed destinations were connected to within the last Config.Idle.
func (k *kernel) used() (dests []netip.AddrPort, err error) {
	for _, s := range k.sets {
		elements, err := k.conn.GetSetElements(s.used)
		if err != nil {
			return nil, fmt.Errorf("hold: read set %s: %w", s.used.Name, err)
		}
		for _, e := range elements {
			if d, ok := destinationOf(e.Key); ok {
				dests = append(dests, d)
			}
		}
	}
	return dests, nil
}

// There reports whether the calling thread's network namespace has the table, in whatever state.
func There() (bool, error) {
	conn, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("hold: open nftables: %w", err)
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("hold: read tables: %w", err)
	}
	return slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == TableName }), nil
}

// Remove deletes the table of the calling thread's network namespace. It is no error if there is none.
func Remove() error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("hold: open nftables: %w", err)
	}
	conn.DelTable(table())
	if err := conn.Flush(); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("hold: delete table inet %s: %w", TableName, err)
	}
	return nil
}
