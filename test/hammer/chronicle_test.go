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
	}{
		{1, 2, Denied},
		{1, 9.9, Denied},
		{1, 10, Either}, // the next may be in force as soon as it is begun
		{10.5, 11, Either},
		{11, 12, Either}, // confirmed, and not settled
		{11.25, 12, Allowed},
		{15, 19, Allowed},
		{15, 25, Either},
		{21.25, 29, Denied},
		{22, 31, Either},
		{40, 41, Either}, // what nobody has confirmed never displaces what was there
	} {
		if got := c.Judge("a", "b", at(test.began), at(test.ended)); got != test.want {
			t.Errorf("from %v to %v: %s, want %s", test.began, test.ended, got, test.want)
		}
	}
}
