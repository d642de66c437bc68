package hold

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// kernel writes the table of one network namespace. It is not safe for concurrent use.
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
	// One transaction may hold all elements and gets an answer for each message: more than fits the default buffers.
	buffers := func(c *netlink.Conn) error { return errors.Join(c.SetReadBuffer(4<<20), c.SetWriteBuffer(4<<20)) }
	conn, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(buffers))
	if err != nil {
		return nil, fmt.Errorf("hold: open nftables: %w", err)
	}
	return &kernel{conn: conn, sets: newSets(c)}, nil
}

func (k *kernel) close() { _ = k.conn.CloseLasting() }

// apply writes the table, without any element of allowed and denied, in one transaction.
func (k *kernel) apply(c Config, holding bool) error {
	if err := build(k.conn, c, k.sets, holding); err != nil {
		return err
	}
	if err := k.fill(c); err != nil {
		return err
	}
	if err := k.conn.Flush(); err != nil {
		return fmt.Errorf("hold: write table inet %s (needs CAP_NET_ADMIN and nf_tables with reject and log): %w", tableName, err)
	}
	return nil
}

// external replaces what is admitted outside the cluster, in one transaction.
func (k *kernel) external(c Config) error {
	for _, s := range k.sets {
		k.conn.FlushSet(s.external)
	}
	if err := k.fill(c); err != nil {
		return err
	}
	if err := k.conn.Flush(); err != nil {
		return fmt.Errorf("hold: write the external destinations: %w", err)
	}
	return nil
}

func (k *kernel) fill(c Config) error {
	for f, boxes := range admitted(&c.External) {
		elements := make([]nftables.SetElement, len(boxes))
		for i, b := range boxes {
			elements[i] = nftables.SetElement{
				Key:    key(netip.AddrPortFrom(b.first, b.ports.First)),
				KeyEnd: key(netip.AddrPortFrom(b.last, b.ports.Last)),
			}
		}
		if err := k.change(k.conn.SetAddElements, k.sets[f].external, elements); err != nil {
			return err
		}
	}
	return nil
}

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
				k.change(k.conn.SetAddElements, set, all),
				k.change(k.conn.SetDeleteElements, set, all),
				k.change(k.conn.SetAddElements, set, wanted),
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

// change puts elements into the transaction, as many to a message as its 16 bits of length hold.
func (k *kernel) change(with func(*nftables.Set, []nftables.SetElement) error, s *nftables.Set, elements []nftables.SetElement) error {
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

// Remove deletes the table of the calling thread's network namespace. It is no error if there is none.
func Remove() error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("hold: open nftables: %w", err)
	}
	conn.DelTable(table())
	if err := conn.Flush(); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("hold: delete table inet %s: %w", tableName, err)
	}
	return nil
}
