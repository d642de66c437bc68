package svid

import "time"

const (
	// clockCheck is how often Run looks whether the clock has been set.
	clockCheck = 5 * time.Second
	// clockSlack is by how much the wall clock may run differently from the monotonic one between two looks: NTP slews far slower.
	clockSlack = 2 * time.Second
)

// clock notices when the wall clock has been set. Certificates go by the wall clock, timers by the monotonic one, which also stands still while
// the machine sleeps.
type clock struct {
	now   func() time.Time // the wall clock
	wall  time.Time        // at the last look
	since time.Time        // the monotonic clock then
}

func newClock(now func() time.Time) *clock {
	c := &clock{now: now}
	c.set()
	return c
}

// set looks, and returns by how much the wall clock was moved since the last look; small differences are 0.
func (c *clock) set() time.Duration {
	wall, mono := c.now().Round(0), time.Now()
	moved := wall.Sub(c.wall) - mono.Sub(c.since)
	c.wall, c.since = wall, mono
	if moved.Abs() < clockSlack {
		return 0
	}
	return moved
}
