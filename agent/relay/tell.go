package relay

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"time"
)

// tellPatience is how long the relay waits until changes have been told.
const tellPatience = time.Second

// teller tells changes of answers in a goroutine of its own, so that whoever is told cannot hold up Envoy for long.
type teller struct {
	logger *slog.Logger
	tell   func(map[netip.AddrPort]Verdict)
	some   chan struct{}

	mu      sync.Mutex
	pending map[netip.AddrPort]Verdict
	told    chan struct{} // closed when what is pending has been told
	late    bool          // it takes longer than tellPatience
}

func newTeller(logger *slog.Logger) *teller {
	return &teller{logger: logger, some: make(chan struct{}, 1), pending: map[netip.AddrPort]Verdict{}, told: make(chan struct{})}
}

// hand has changes told. It returns when they have been, or when that takes too long: Envoy hears of a denial, and the control plane that an
// admission is in force, only after that.
func (t *teller) hand(ctx context.Context, news map[netip.AddrPort]Verdict) {
	t.mu.Lock()
	for dest, v := range news {
		t.pending[dest] = v
	}
	told, late := t.told, t.late
	t.mu.Unlock()
	poke(t.some)
	if late {
		return
	}
	timer := time.NewTimer(tellPatience)
	defer timer.Stop()
	select {
	case <-told:
	case <-ctx.Done():
	case <-timer.C:
		t.logger.Warn("relay: changed answers are not taken note of in time; going on without waiting longer", "patience", tellPatience)
		t.mu.Lock()
		t.late = true
		t.mu.Unlock()
	}
}

func (t *teller) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.some:
		}
		t.mu.Lock()
		news, told := t.pending, t.told
		t.pending, t.told = map[netip.AddrPort]Verdict{}, make(chan struct{})
		t.mu.Unlock()
		if len(news) > 0 {
			t.tell(news)
		}
		close(told)
		t.mu.Lock()
		t.late = false
		t.mu.Unlock()
	}
}
