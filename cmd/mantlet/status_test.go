package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mantlet/mantlet/controlplane/status"
)

// What was seen last counts, and not a look that the end of the time cut short, whoever notices that first.
func TestWaitEndsWithWhatWasSeen(t *testing.T) {
	for name, c := range map[string]struct {
		cut  time.Duration // before the end of the time the look fails
		want int
		text string
	}{
		"the look ends with the time": {0, notEverywhere, "shop/db is not in force everywhere after 6s"},
		"the look fails before":       {time.Second, cannotTell, "after 6s it is not known whether shop/db is in force"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := statusFlags{timeout: 6 * time.Second}
				until := time.Now().Add(f.timeout)
				ctx, cancel := context.WithDeadline(t.Context(), until.Add(time.Millisecond)) // it notices late
				defer cancel()
				looks := 0
				look := func(context.Context) (status.Status, error) {
					if looks++; looks == 1 {
						return status.Merge([]status.Report{{Replica: "a"}}, nil), nil
					}
					<-time.After(time.Until(until) - c.cut) // in the bubble's time
					return status.Status{}, errors.New("there was no time")
				}
				var progress strings.Builder
				err := f.follow(ctx, until, look, status.Policy{Name: "shop/db"}, &progress)
				var e *exit
				if !errors.As(err, &e) || e.code != c.want || !strings.Contains(err.Error(), c.text) {
					t.Errorf("got %v, want exit code %d and %q", err, c.want, c.text)
				}
			})
		})
	}
}
