package traffic

import (
	"context"
	"encoding/json"
	"io"
	"maps"
	"sync"
	"time"
)

// Tally is what came of the attempts at one address so far.
type Tally struct {
	To       string          `json:"to"`
	Tried    int             `json:"tried"`
	Outcomes map[Outcome]int `json:"outcomes"`
	// Lately are the last attempts whose outcome was another than that of the attempt before, at most ten.
	Lately []Change `json:"lately,omitempty"`
}

// Change is an attempt that came out as the one before it did not.
type Change struct {
	At time.Time `json:"at"`
	Attempt
}

// Pace of a flood: between two attempts at one address, and between two tallies.
const (
	between = 20 * time.Millisecond
	telling = 250 * time.Millisecond
)

// Flood tries all addresses side by side until ctx ends, and writes a Tally of each as a JSON line four times a second.
func Flood(ctx context.Context, out io.Writer, addresses []string) error {
	tallies := make([]Tally, len(addresses))
	var mu sync.Mutex
	var all sync.WaitGroup
	defer all.Wait()
	for i, to := range addresses {
		tallies[i] = Tally{To: to, Outcomes: map[Outcome]int{}}
		all.Go(func() {
			var last Outcome
			for every(ctx, between) {
				began := time.Now()
				a := Try(ctx, to)
				if ctx.Err() != nil { // what it says is about the end
					return
				}
				mu.Lock()
				tallies[i].count(a, last, began)
				mu.Unlock()
				last = a.Outcome
			}
		})
	}
	lines := json.NewEncoder(out)
	for every(ctx, telling) {
		for i := range tallies {
			mu.Lock()
			t := tallies[i]
			t.Outcomes = maps.Clone(t.Outcomes)
			mu.Unlock()
			if err := lines.Encode(t); err != nil {
				return err
			}
		}
	}
	return nil
}

func (t *Tally) count(a Attempt, last Outcome, began time.Time) {
	t.Tried++
	t.Outcomes[a.Outcome]++
	if a.Outcome == last {
		return
	}
	const most = 10
	kept := t.Lately[max(0, len(t.Lately)-most+1):]
	t.Lately = append(append([]Change{}, kept...), Change{At: began, Attempt: a}) // a tally that is being written keeps its own
}

// every waits, and says whether to go on.
func every(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
