package svid

import (
	"sync/atomic"
	"testing"
	"time"
)

// When the clock is set the SVID is renewed within seconds. Where it is set past the end of what the control plane signs, there is no identity
// until it is set back.
func TestClockIsSet(t *testing.T) {
	bubble(t, func(t *testing.T, p *plane) {
		defer p.up(p.server(p.ca), p.ca)()
		var offset atomic.Int64
		cfg := p.config()
		cfg.Now = func() time.Time { return time.Now().Add(time.Duration(offset.Load())) }
		b, stop := p.run(cfg)
		defer stop()
		<-b.Ready()
		for _, to := range []time.Duration{40 * time.Minute, 0, -24 * time.Hour, 0} {
			began, updated := time.Now(), b.Updated()
			offset.Store(int64(to))
			<-updated
			if took := time.Since(began); took > 2*clockCheck {
				t.Errorf("renewed %s after the clock was set to %s", took, to)
			}
			if _, err := b.GetX509SVID(); err != nil {
				t.Errorf("%s: %v", to, err)
			}
		}

		offset.Store(int64(2 * time.Hour))
		if _, err := b.GetX509SVID(); err == nil {
			t.Error("an SVID that has expired by the clock is handed out")
		}
		<-time.After(time.Minute) // of the fake clock
		if _, err := b.GetX509SVID(); err == nil {
			t.Error("what the control plane signs has expired by the clock, and is handed out")
		}
		if n := len(p.dials.all()); n > 120 {
			t.Errorf("%d connections to the control plane in a minute", n)
		}
		updated := b.Updated()
		offset.Store(0)
		<-updated
		if _, err := b.GetX509SVID(); err != nil {
			t.Errorf("the clock is right again: %v", err)
		}
	})
}

// A clock that is slewed is not one that was set.
func TestClockThatDrifts(t *testing.T) {
	now := time.Now()
	c := newClock(func() time.Time { return now })
	c.since = c.since.Add(-clockCheck) // as much later by the monotonic clock
	now = now.Add(clockCheck + 100*time.Millisecond)
	if moved := c.set(); moved != 0 {
		t.Errorf("moved by %s", moved)
	}
	now = now.Add(-time.Hour)
	if moved := c.set(); moved > -59*time.Minute {
		t.Errorf("moved by %s", moved)
	}
}
