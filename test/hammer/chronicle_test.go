package hammer

import (
	"testing"
	"time"
)

// What was in force while an attempt lasted: from the last state confirmed well before it to the last one begun before its end.
func TestJudge(t *testing.T) {
	t0 := time.Now()
	at := func(s float64) time.Time { return t0.Add(time.Duration(s * float64(time.Second))) }
	is := func(allowed bool) Allows { return func(string, string) bool { return allowed } }
	c := NewChronicle(is(false))
	c.states = append(c.states,
		state{is(true), at(10), at(11)},
		state{is(false), at(20), at(21)},
		state{is(true), at(30), time.Time{}}, // not confirmed yet
	)
	for _, test := range []struct {
		began, ended float64
		want         Verdict
		states       int
	}{
		{1, 2, Denied, 1},
		{1, 9.9, Denied, 1},
		{1, 10, Either, 2}, // the next may be in force as soon as it is begun
		{10.5, 11, Either, 2},
		{11, 12, Either, 2}, // confirmed, and not settled
		{11.25, 12, Allowed, 1},
		{15, 19, Allowed, 1},
		{15, 25, Either, 2},
		{1, 25, Either, 3},
		{21.25, 29, Denied, 1},
		{22, 31, Either, 2},
		{40, 41, Either, 2}, // what nobody has confirmed never displaces what was there
	} {
		got, states := c.Judge("a", "b", at(test.began), at(test.ended))
		if got != test.want || states != test.states {
			t.Errorf("from %v to %v: %s of %d states, want %s of %d", test.began, test.ended, got, states, test.want, test.states)
		}
	}
}
