package incluster

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// flood is a pod that tries addresses without end. What it says is read from the node's file system: it can be while no API server runs.
type flood struct {
	place
	pod, log  string
	addresses []string
}

// flood starts one; its label app is its name.
func (p place) flood(name, more string, addresses ...string) *flood {
	p.Helper()
	p.apply(flooding(name, more, addresses...))
	p.ready("pod/" + name)
	f := &flood{place: p, pod: name, addresses: addresses}
	f.log = f.logOf(name)
	return f
}

// logOf is where the node has what a pod's app writes.
func (p place) logOf(name string) string {
	p.Helper()
	pod := p.pod(name)
	node, err := p.Cluster.Machine(pod.Spec.NodeName)
	if err != nil {
		p.Fatal(err)
	}
	return filepath.Join(node.Root(), "var/log/pods", fmt.Sprintf("%s_%s_%s", p.name, name, pod.UID), "app", "0.log")
}

// tallies are the last ones, by address.
func (f *flood) tallies() (map[string]traffic.Tally, error) {
	return lastLines(f.log, func(t traffic.Tally) string { return t.To })
}

// lastLines are the last JSON lines of each kind in a pod's log.
func lastLines[T any](path string, kind func(T) string) (map[string]T, error) {
	log, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	all := map[string]T{}
	for lines := bufio.NewScanner(log); lines.Scan(); {
		_, text, whole := strings.Cut(lines.Text(), " F ") // the runtime's: time, stream, "F" of a full line
		var t T
		if whole && json.Unmarshal([]byte(text), &t) == nil {
			all[kind(t)] = t
		}
	}
	return all, nil
}

// more waits until every address was tried n times more.
func (f *flood) more(n int) map[string]traffic.Tally {
	f.Helper()
	before, err := f.tallies()
	if err != nil {
		f.Fatal(err)
	}
	var now map[string]traffic.Tally
	err = Await(f.Context(), patience, func(context.Context) error {
		if now, err = f.tallies(); err != nil {
			return err
		}
		for _, to := range f.addresses {
			if now[to].Tried < before[to].Tried+n {
				return fmt.Errorf("from %s to %s: %d attempts, and %d before", f.pod, to, now[to].Tried, before[to].Tried)
			}
		}
		return nil
	})
	if err != nil {
		f.Fatal(err)
	}
	return now
}

// settled is how many attempts have to pass so that all that come were begun after the call: attempts at one address follow each other.
const settled = 3

// becomes waits until attempts at all addresses come out as they are to.
func (f *flood) becomes(why string, want traffic.Outcome) {
	f.Helper()
	err := Await(f.Context(), patience, func(context.Context) error {
		now, err := f.tallies()
		if err != nil {
			return err
		}
		for _, to := range f.addresses {
			if lately := now[to].Lately; len(lately) == 0 || lately[len(lately)-1].Outcome != want {
				return fmt.Errorf("to %s: %+v", to, lately)
			}
		}
		return nil
	})
	if err != nil {
		f.Errorf("%s: from %s: want %s: %v", why, f.pod, want, err)
	}
}

// never wants no attempt since mark to have come out so.
func (f *flood) never(why string, mark map[string]traffic.Tally, bad traffic.Outcome) {
	f.Helper()
	now := f.more(settled)
	for _, to := range f.addresses {
		if n := now[to].Outcomes[bad] - mark[to].Outcomes[bad]; n > 0 {
			f.Errorf("%s: from %s to %s: %s %d times: %+v", why, f.pod, to, bad, n, now[to])
		}
	}
}

// since tries n times more, and wants all that was tried since mark to be as it is to be.
func (f *flood) since(why string, mark map[string]traffic.Tally, n int, want traffic.Outcome) {
	f.Helper()
	now := f.more(n)
	for _, to := range f.addresses {
		was, is := mark[to], now[to]
		if got, all := is.Outcomes[want]-was.Outcomes[want], is.Tried-was.Tried; got != all {
			f.Errorf("%s: from %s to %s: %s %d of %d times: %v, before: %v, lately: %+v", why, f.pod, to, want, got, all, is.Outcomes, was.Outcomes, is.Lately)
		} else {
			f.Logf("%s: from %s to %s: %s %d of %d times", why, f.pod, to, want, got, all)
		}
	}
}
