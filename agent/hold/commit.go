package hold

import (
	"net/netip"
	"slices"
	"time"
)

// change is a new verdict. Without ttl nothing shall be known of the destination.
type change struct {
	dest    netip.AddrPort
	allowed bool
	ttl     time.Duration
	answers *question // nil: said by Set, Flip or Forget
}

// batch is changes for one transaction.
type batch struct {
	changes []change
	done    chan struct{}
	err     error
}

// commit returns when the kernel has the changes. While one transaction is in flight those who come gather for the next: the cost
// of many answers at once is that of two transactions, not of many.
func (h *Holder) commit(changes ...change) error {
	h.queue.Lock()
	b := h.batch
	leads := b == nil
	if leads {
		b = &batch{done: make(chan struct{})}
		h.batch = b
	}
	b.changes = append(b.changes, changes...)
	h.queue.Unlock()
	if !leads {
		<-b.done
		return b.err
	}
	h.mu.Lock() // waits for the transaction in flight
	h.queue.Lock()
	h.batch = nil
	h.queue.Unlock()
	evicted, err := h.write(b.changes)
	h.mu.Unlock()
	b.err = err
	close(b.done)
	h.forgotten(evicted)
	return err
}

// write brings changes into the kernel and the ledger, with h.mu held. The later of two changes counts. A failure leaves the kernel as it
// was and ends Run: what the ledger says is then of no account any more.
func (h *Holder) write(changes []change) (evicted []netip.AddrPort, err error) {
	now := time.Now()
	last := map[netip.AddrPort]element{}
	for _, c := range changes {
		if q := h.pending[c.dest]; c.answers != nil && c.answers.overruled {
			continue
		} else if c.answers == nil && q != nil {
			q.overruled = true
		}
		last[c.dest] = element{c.dest, c.allowed, c.ttl}
	}
	elements := make([]element, 0, len(last))
	known := func(dest netip.AddrPort) bool { return h.ledger.known[dest] != nil }
	before := map[netip.AddrPort]bool{}
	for dest, e := range last {
		before[dest] = known(dest)
		if e.ttl == 0 {
			h.ledger.remove(dest)
			continue
		}
		evicted = append(evicted, h.ledger.put(dest, e.allowed, now, now.Add(e.ttl))...)
	}
	evicted = slices.DeleteFunc(evicted, known) // let go and put again
	for dest, e := range last {
		switch {
		case e.ttl == 0 || known(dest):
			elements = append(elements, e)
		case before[dest]: // put, and let go again for the others
			elements = append(elements, element{dest: dest})
		}
	}
	for _, dest := range evicted {
		if _, ok := last[dest]; !ok {
			elements = append(elements, element{dest: dest})
		}
	}
	if len(elements) == 0 {
		return evicted, nil
	}
	if err := h.kernel.write(elements); err != nil {
		h.fail(err)
		return nil, err
	}
	return evicted, nil
}

// sweep forgets destinations that had their time and renews allowed ones that are in use.
func (h *Holder) sweep() error {
	h.mu.Lock()
	used, err := h.kernel.used()
	if err != nil {
		h.mu.Unlock()
		return err
	}
	now := time.Now()
	for _, dest := range used {
		h.ledger.use(dest, now)
	}
	gone, renew := h.ledger.age(now, h.cfg.Idle)
	elements := make([]element, 0, len(gone)+len(renew))
	for _, dest := range gone {
		h.ledger.remove(dest)
		elements = append(elements, element{dest: dest})
	}
	life := ttl(true, h.cfg.Idle)
	for _, dest := range renew {
		h.ledger.renew(dest, now.Add(life))
		elements = append(elements, element{dest, true, life})
	}
	if len(elements) > 0 {
		err = h.kernel.write(elements)
	}
	h.mu.Unlock()
	if err != nil {
		return err
	}
	h.forgotten(gone)
	return nil
}

func (h *Holder) forgotten(dests []netip.AddrPort) {
	if len(dests) > 0 && h.cfg.Forgotten != nil {
		h.cfg.Forgotten(dests)
	}
}
