package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// sendersAtOnce bounds how many pods send at the same time: what they send to one port must find room in its socket, which takes some
// hundred datagrams.
const sendersAtOnce = 16

// patience of each round of datagrams. All of a round wait together, so that a matrix full of denials takes one round. What was lost on
// the way, or was received and not answered in time, goes into the next.
var patience = []time.Duration{600 * time.Millisecond, 3 * time.Second, 10 * time.Second}

// exchange is what became of a datagram and its answer, over all rounds.
type exchange struct {
	outcome netns.Outcome // of the last round
	// arrived are the servers that received the datagram, "namespace/pod:port", each once.
	arrived []string
	seen    []netip.Addr // the source's address as they saw it, each once
}

// exchange sends a datagram for each of those attempts. Nobody says that a datagram was dropped; what is known for certain is who received
// what, once nothing is on its way any more. So silence of a datagram that no server has is a denial, whatever the machine's load.
func (s *Sandbox) exchange(ctx context.Context, attempts []matrix.Attempt, which []int) (map[int]*exchange, error) {
	if len(which) == 0 {
		return nil, nil
	}
	if _, _, err := s.arrivals(ctx); err != nil { // what others have left
		return nil, err
	}
	all := make(map[int]*exchange, len(which))
	for round, within := range patience {
		before, err := s.network.Overrun()
		if err != nil {
			return nil, err
		}
		nonces, err := s.send(ctx, attempts, which, all, fmt.Sprintf("%d-%d", s.tries, round), within)
		if err != nil {
			return nil, err
		}
		if err := s.network.Fence(ctx); err != nil {
			return nil, err
		}
		after, err := s.network.Overrun()
		if err != nil {
			return nil, err
		}
		received, lost, err := s.arrivals(ctx)
		if err != nil {
			return nil, err
		}
		for _, r := range received {
			if i, ours := nonces[r.Nonce]; ours {
				all[i].add(r)
			}
		}
		certain := lost == 0 && before == after
		which = slices.DeleteFunc(which, func(i int) bool {
			e := all[i]
			return e.outcome.Err != netns.TimedOut || len(e.arrived) == 0 && certain
		})
		switch {
		case len(which) == 0:
			return all, nil
		case !certain && round == len(patience)-1:
			return nil, errors.New("this machine loses datagrams on the way, and what is lost cannot be told from what is denied\n  hint: try again when it is less busy")
		}
	}
	return all, nil // the last ones arrive, and are never answered
}

// send sends the datagrams of a round and returns which attempt a nonce belongs to.
func (s *Sandbox) send(ctx context.Context, attempts []matrix.Attempt, which []int, all map[int]*exchange, prefix string, within time.Duration) (map[string]int, error) {
	nonces := make(map[string]int, len(which))
	byPod := map[string][]int{}
	for _, i := range which {
		nonces[nonce(prefix, i)] = i
		byPod[attempts[i].From] = append(byPod[attempts[i].From], i)
		if all[i] == nil {
			all[i] = &exchange{}
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(sendersAtOnce)
	for name, list := range byPod {
		g.Go(func() error {
			targets := make([]netns.Target, len(list))
			for k, i := range list {
				targets[k] = netns.Target{Addr: attempts[i].Addr, Protocol: netns.UDP, Speaks: netns.ClientFirst, Nonce: nonce(prefix, i), Timeout: within}
			}
			outcomes, err := s.pods[name].net.Probe(ctx, targets)
			if err != nil {
				return fmt.Errorf("datagrams from %s: %w", name, err)
			}
			for k, i := range list {
				all[i].outcome = outcomes[k] // nobody else has this one
			}
			return nil
		})
	}
	return nonces, g.Wait()
}

func nonce(prefix string, i int) string { return fmt.Sprintf("%s-%d", prefix, i) }

// received is a datagram at the server that has it.
type received struct {
	netns.Arrival
	by string
}

func (e *exchange) add(r received) {
	server := fmt.Sprintf("%s:%d", r.by, r.Port)
	if !slices.Contains(e.arrived, server) {
		e.arrived = append(e.arrived, server)
	}
	if !slices.Contains(e.seen, r.From.Addr()) {
		e.seen = append(e.seen, r.From.Addr())
	}
}

// arrivals asks every server what it has received since it was last asked, and how much found no room.
func (s *Sandbox) arrivals(ctx context.Context) (list []received, lost int, err error) {
	type server interface {
		Name() string
		Arrivals(context.Context) (*netns.Arrivals, error)
	}
	var servers []server
	for _, p := range s.pods {
		servers = append(servers, p.net)
	}
	for _, o := range s.outsides {
		servers = append(servers, o)
	}
	var mu sync.Mutex
	g, ctx := errgroup.WithContext(ctx)
	for _, sv := range servers {
		g.Go(func() error {
			got, err := sv.Arrivals(ctx)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			lost += got.Lost
			for _, a := range got.Datagrams {
				list = append(list, received{a, sv.Name()})
			}
			return nil
		})
	}
	return list, lost, g.Wait()
}

// judgeExchange fills a connection, which holds what the evaluator expects, with what really happened to the datagram.
func (s *Sandbox) judgeExchange(c *matrix.Connection, a matrix.Attempt, e *exchange) {
	expected, o := c.Verdict, e.outcome
	c.Verdict, c.Authenticated = matrix.Denied, false
	c.Observed = &matrix.Observed{Datagram: word(o.Err), Bytes: o.Bytes}
	switch {
	case o.Connect != netns.Connected:
		c.Datagram = word(o.Connect)
	case o.Reached != "":
		c.Verdict, c.Datagram = matrix.Allowed, matrix.Answered
	case o.Err == netns.TimedOut && len(e.arrived) == 0:
		c.Datagram = matrix.Silence
	case o.Err == netns.TimedOut:
		c.Datagram = matrix.Unanswered
	}
	if len(e.arrived) > 0 {
		c.Verdict = matrix.Allowed
	}
	switch {
	case c.Verdict != expected && c.Partly == "" && !s.otherNodes(a): // else chance, or another node, decides
		c.Mismatch = fmt.Sprintf("the evaluator says %s (%s); the datagram says %s (%s%s)", expected, c.Reason.Text, c.Verdict, c.Datagram, at(e.arrived))
	case c.Verdict == matrix.Allowed && c.Datagram != matrix.Answered:
		c.Mismatch = fmt.Sprintf("the datagram arrived%s, and the source heard: %s", at(e.arrived), c.Datagram)
	case c.Verdict == matrix.Denied && o.Bytes > 0:
		c.Mismatch = fmt.Sprintf("%d bytes arrived: a denied peer must get none", o.Bytes)
	}
	if c.Mismatch != "" {
		return
	}
	source, _ := s.index.Pod(a.From)
	for _, server := range e.arrived {
		pod := podOf(server)
		switch {
		case !s.meant(a, pod):
			c.Mismatch = fmt.Sprintf("received by %s, which is not what the address stands for", server)
		case pod == a.From: // by way of a Service it may be the node's address that it sees
		case slices.ContainsFunc(e.seen, func(from netip.Addr) bool { return !slices.Contains(source.Addrs, from) }):
			c.Mismatch = fmt.Sprintf("%s saw it come from %v, and not from an address of %s, by which it is told", server, e.seen, a.From)
		}
	}
}

func at(servers []string) string {
	if len(servers) == 0 {
		return ""
	}
	return " at " + strings.Join(servers, ", ")
}
