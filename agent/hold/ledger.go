package hold

import (
	"container/list"
	"net/netip"
	"time"
)

// ledger knows which elements the kernel has, and which were used longest ago. It never believes longer than the kernel does that an
// element is there.
type ledger struct {
	known  map[netip.AddrPort]*list.Element // of *entry
	recent [2]*list.List                    // denied, allowed: the most recently used in front
	limit  [2]int
}

type entry struct {
	dest    netip.AddrPort
	allowed bool
	written time.Time // when the element was written
	seen    time.Time // when the destination was last known to be used
	until   time.Time // when the kernel drops the element
}

func newLedger(maxAllowed, maxDenied int) *ledger {
	return &ledger{
		known:  map[netip.AddrPort]*list.Element{},
		recent: [2]*list.List{list.New(), list.New()},
		limit:  [2]int{maxDenied, maxAllowed},
	}
}

func side(allowed bool) int {
	if allowed {
		return 1
	}
	return 0
}

// put notes an element and returns what has to go for it, at most one.
func (l *ledger) put(dest netip.AddrPort, allowed bool, now, until time.Time) (evicted []netip.AddrPort) {
	l.remove(dest)
	s := side(allowed)
	if l.recent[s].Len() >= l.limit[s] {
		oldest := l.recent[s].Back().Value.(*entry).dest
		l.remove(oldest)
		evicted = append(evicted, oldest)
	}
	l.known[dest] = l.recent[s].PushFront(&entry{dest: dest, allowed: allowed, written: now, seen: now, until: until})
	return evicted
}

func (l *ledger) remove(dest netip.AddrPort) {
	if e, ok := l.known[dest]; ok {
		l.recent[side(e.Value.(*entry).allowed)].Remove(e)
		delete(l.known, dest)
	}
}

// justWritten reports whether the element was written so short a time ago that a SYN may have been logged before.
func (l *ledger) justWritten(dest netip.AddrPort, now time.Time) bool {
	e, ok := l.known[dest]
	if !ok {
		return false
	}
	n := e.Value.(*entry)
	return now.Before(n.until) && now.Sub(n.written) < 2*time.Second
}

// use notes that an allowed destination is in use.
func (l *ledger) use(dest netip.AddrPort, now time.Time) {
	if e, ok := l.known[dest]; ok && e.Value.(*entry).allowed {
		e.Value.(*entry).seen = now
		l.recent[1].MoveToFront(e)
	}
}

// renew notes that the kernel keeps an element until a later time.
func (l *ledger) renew(dest netip.AddrPort, until time.Time) {
	if e, ok := l.known[dest]; ok {
		e.Value.(*entry).until = until
	}
}

// age tells which elements have had their time (denied ones that the kernel dropped, allowed ones not used for idle) and which allowed
// ones are in use and to be written again before the kernel drops them.
func (l *ledger) age(now time.Time, idle time.Duration) (gone, renew []netip.AddrPort) {
	for _, order := range l.recent {
		for e := order.Front(); e != nil; e = e.Next() {
			n := e.Value.(*entry)
			switch {
			case !now.Before(n.until), n.allowed && now.Sub(n.seen) >= idle:
				gone = append(gone, n.dest)
			case n.allowed && n.until.Sub(now) <= idle+idle/2:
				renew = append(renew, n.dest)
			}
		}
	}
	return gone, renew
}
