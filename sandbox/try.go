package sandbox

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/verdict"
)

// podsAtOnce bounds how many pods probe at the same time: more only wait for each other on a small machine.
const podsAtOnce = 4

// flowPatience bounds the wait for the sidecar's word on a connection that has already been seen to work.
const flowPatience = 10 * time.Second

// Flow is one connection that was allowed and authenticated, as the sidecar at the destination saw it.
type Flow struct {
	From, To            string // "namespace/pod"
	FromID, ToID        string // SPIFFE IDs
	Source, Destination netip.AddrPort
	Reason              verdict.Reason
}

// Result is what Try found.
type Result struct {
	Report *matrix.Report
	Flows  []Flow // one for each authenticated connection to a pod, in the order of the report
}

// Try makes all attempts with real packets and holds what becomes of them against the evaluator. It fails for attempts that cannot be
// made: see Tried.
func (s *Sandbox) Try(ctx context.Context, attempts []matrix.Attempt) (*Result, error) {
	s.tries++
	var streams, datagrams []int
	for i, a := range attempts {
		switch proto, ok := carried(a.Protocol); {
		case !ok:
			return nil, fmt.Errorf("%s → %s at %s: %s cannot be tried", a.From, a.To, a.Addr, a.Protocol)
		case proto == netns.UDP:
			datagrams = append(datagrams, i)
		default:
			streams = append(streams, i)
		}
	}
	outcomes := make([]netns.Outcome, len(attempts))
	var exchanges map[int]*exchange
	s.cfg.Progress("connections", 0, len(attempts))
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.probe(gctx, attempts, streams, outcomes) })
	g.Go(func() (err error) {
		exchanges, err = s.exchange(gctx, attempts, datagrams)
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	s.cfg.Progress("evidence", 0, len(attempts))
	expected := matrix.Simulate(s.index, attempts)
	res := &Result{Report: &matrix.Report{Connections: make([]matrix.Connection, len(attempts))}}
	for i, a := range attempts {
		c := expected.Connections[i]
		if e := exchanges[i]; e != nil {
			s.judgeExchange(&c, a, e)
			res.Report.Connections[i] = c
			continue
		}
		flow, err := s.judge(ctx, &c, a, outcomes[i])
		if err != nil {
			return nil, err
		}
		if flow != nil && a.Via == matrix.ViaPod {
			res.Flows = append(res.Flows, *flow)
		}
		res.Report.Connections[i] = c
	}
	res.Report.Summarize()
	s.cfg.Progress("evidence", len(attempts), len(attempts))
	return res, nil
}

// probe makes those of the attempts that are TCP, some pods at a time, and puts the outcomes where the attempts stand.
func (s *Sandbox) probe(ctx context.Context, attempts []matrix.Attempt, which []int, out []netns.Outcome) error {
	byPod := map[string][]int{}
	for _, i := range which {
		byPod[attempts[i].From] = append(byPod[attempts[i].From], i)
	}
	var mu sync.Mutex
	done := 0
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(podsAtOnce)
	for _, p := range s.cfg.Manifests.Objects.Pods {
		name := p.Namespace + "/" + p.Name
		for at := range slices.Chunk(byPod[name], 200) {
			g.Go(func() error {
				targets := make([]netns.Target, len(at))
				for i, n := range at {
					targets[i] = s.target(attempts[n], n)
				}
				outcomes, err := s.pods[name].net.Probe(ctx, targets)
				if err != nil {
					return fmt.Errorf("probes from %s: %w", name, err)
				}
				mu.Lock()
				defer mu.Unlock()
				for i, n := range at {
					out[n] = outcomes[i]
				}
				done += len(at)
				s.cfg.Progress("connections", done, len(attempts))
				return nil
			})
		}
	}
	return g.Wait()
}

func (s *Sandbox) target(a matrix.Attempt, n int) netns.Target {
	t := netns.Target{Addr: a.Addr, Speaks: netns.ClientFirst, Nonce: fmt.Sprintf("attempt-%d", n)}
	if s.serverFirst(a) {
		t.Speaks, t.Nonce = netns.ServerFirst, ""
	}
	return t
}

// serverFirst asks the pod that is meant, or the first one behind the service.
func (s *Sandbox) serverFirst(a matrix.Attempt) bool {
	d, ok := s.index.Destination(verdict.TCP, a.Addr)
	if !ok || len(d.Endpoints) == 0 {
		return false
	}
	p := s.pods[d.Endpoints[0].Pod]
	return p != nil && slices.ContainsFunc(p.ports, func(l matrix.Listener) bool {
		return l.Port == d.Endpoints[0].Addr.Port() && l.ServerFirst // TCP only
	})
}

// judge fills a connection, which holds what the evaluator expects, with what really happened.
func (s *Sandbox) judge(ctx context.Context, c *matrix.Connection, a matrix.Attempt, o netns.Outcome) (*Flow, error) {
	expected, authenticated := c.Verdict, c.Authenticated
	c.Verdict, c.Authenticated = matrix.Denied, false
	c.Observed = &matrix.Observed{Connect: word(o.Connect), Bytes: o.Bytes}
	reached := podOf(o.Reached)
	var flow *Flow
	switch {
	case o.Reached != "":
		c.Verdict = matrix.Allowed
		if p := s.pods[reached]; p != nil && reached != a.From {
			var err error
			if flow, err = s.evidence(ctx, a.From, p, o); err != nil {
				return nil, err
			}
			c.Authenticated = flow != nil
		}
	case o.Bytes > 0:
		c.Mismatch = fmt.Sprintf("%d bytes arrived, and then %s: a denied peer must get none", o.Bytes, o.Err)
	case o.Connect == netns.TimedOut || o.Err == netns.TimedOut:
		c.Mismatch = fmt.Sprintf("neither refused nor answered within %s", o.Elapsed.Round(time.Millisecond))
	}
	switch {
	case c.Mismatch != "":
	case c.Verdict != expected && c.Partly != "":
	case c.Verdict != expected && s.otherNodes(a): // another node would have decided
	case c.Verdict != expected:
		c.Mismatch = fmt.Sprintf("the evaluator says %s (%s); the packets say %s (connect: %s; then: %s)", expected, c.Reason.Text, c.Verdict, o.Connect, o.Err)
	case c.Verdict == matrix.Allowed && !s.meant(a, reached):
		c.Mismatch = fmt.Sprintf("answered by %s, which is not what the address stands for", o.Reached)
	case authenticated && !c.Authenticated && c.Verdict == matrix.Allowed,
		c.Authenticated && !authenticated && a.Via != matrix.ViaService: // of a service's endpoints some may prove themselves
		c.Mismatch = fmt.Sprintf("the evaluator says authenticated=%v; the sidecar's log says %v", authenticated, c.Authenticated)
	case c.Verdict == expected:
		source, _ := s.index.Pod(a.From)
		c.Mismatch = connectDiffers(source, expected, o)
	}
	if flow != nil {
		flow.Reason = c.Reason
	}
	return flow, nil
}

// meant reports whether whoever answered is what the attempt was made to.
func (s *Sandbox) meant(a matrix.Attempt, reached string) bool {
	switch a.Via {
	case matrix.ViaPod:
		return reached == a.To
	case matrix.ViaExternal:
		return s.pods[reached] == nil
	}
	return slices.ContainsFunc(s.behind(a), func(e policy.Endpoint) bool { return s.answersAs(e, reached) })
}

// evidence waits for what the sidecar of the reached pod logged of the very connection that its app saw, and returns it if it was
// authenticated as the source's identity; the source's sidecar has to tell the same of its end. A connection from a pod without sidecar is let in as plaintext and gives none,
// and so does one to such a pod.
func (s *Sandbox) evidence(ctx context.Context, from string, to *pod, o netns.Outcome) (*Flow, error) {
	ctx, cancel := context.WithTimeout(ctx, flowPatience)
	defer cancel()
	number := o.Reached[strings.LastIndexByte(o.Reached, ':')+1:]
	port, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("%s answers as %q: %w", to.name, o.Reached, err)
	}
	if to.agent == nil {
		return nil, s.unproved(ctx, from, to, o.Seen, uint16(port))
	}
	rec, err := to.agent.flows.wait(ctx, toApp(o.Seen, uint16(port)))
	if err != nil {
		return nil, fmt.Errorf("the sidecar of %s did not log the connection that its app saw from %s: %w", to.name, o.Seen, err)
	}
	want := s.index.Subject(from).ID.String()
	if rec.Peer == "" || !rec.Authenticated {
		return nil, nil
	}
	if rec.Peer != want {
		return nil, fmt.Errorf("the sidecar of %s took a connection from %s for one of %s", to.name, from, rec.Peer)
	}
	id := s.index.Subject(to.name).ID.String()
	if client := s.pods[from].agent; client != nil { // an impostor has none
		told, err := client.flows.waitToPeer(ctx, rec.Source, rec.Destination)
		if err != nil {
			return nil, fmt.Errorf("the sidecar of %s did not log its connection from %s to %s at %s: %w", from, rec.Source, to.name, rec.Destination, err)
		}
		if told.Verdict != flows.Allowed || told.Peer != id || !told.Authenticated {
			return nil, fmt.Errorf("the sidecar of %s logged its connection to %s, which both had to prove, as %s, to %q, authenticated: %t", from, to.name, told.Verdict, told.Peer, told.Authenticated)
		}
	}
	return &Flow{From: from, To: to.name, FromID: rec.Peer, ToID: id, Source: rec.Source, Destination: rec.Destination}, nil
}

// unproved fails where the source's sidecar tells otherwise of a connection to a pod without one than that it led to that pod, which proved nothing.
func (s *Sandbox) unproved(ctx context.Context, from string, to *pod, seen netip.AddrPort, port uint16) error {
	client := s.pods[from].agent
	is, _ := s.index.Pod(to.name)
	i := slices.IndexFunc(is.Addrs, func(a netip.Addr) bool { return a.Is4() == seen.Addr().Unmap().Is4() })
	if client == nil || i < 0 {
		return nil
	}
	at := netip.AddrPortFrom(is.Addrs[i], port)
	told, err := client.flows.waitToPeer(ctx, seen, at)
	if err != nil {
		return fmt.Errorf("the sidecar of %s did not log its connection from %s to %s at %s: %w", from, seen, to.name, at, err)
	}
	if id := is.Subject.ID.String(); told.Verdict != flows.Allowed || told.Peer != id || told.Authenticated {
		return fmt.Errorf("the sidecar of %s logged its connection to %s, which has no sidecar to prove anything, as %s, to %q, authenticated: %t",
			from, to.name, told.Verdict, told.Peer, told.Authenticated)
	}
	return nil
}

// podOf is "namespace/pod" of a server that calls itself "namespace/pod:port".
func podOf(server string) string {
	if i := strings.LastIndexByte(server, ':'); i >= 0 {
		return server[:i]
	}
	return server
}
