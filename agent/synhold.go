package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/agent/verdicts"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
)

// destinations knows which destinations inside the cluster the pod may connect to; *relay.Relay does.
type destinations interface {
	hold.Asker
	// Forget ends the interest in destinations that were asked about.
	Forget(dests []netip.AddrPort)
}

// synHold keeps the pod's SYN hold at work: it opens a hold.Holder when the control plane has said what the cluster is, puts the pod's
// verdicts on addresses outside into it, and opens another one when one fails. While none is at work nothing that was not known before
// gets out.
//
//	mantlet.v1.Network ──applyNetwork──► hold.Holder opened, run, and again after a failure
//	mantlet.v1.Verdicts ──applyVerdicts►    its addresses outside the cluster
//	on-demand clusters ──flip──────────►    its destinations inside
type synHold struct {
	cfg      hold.Config // but for what the control plane says
	asker    destinations
	verdicts *verdicts.Holder
	logger   *slog.Logger

	table sync.Mutex // held while the table is looked at or changes hands

	mu      sync.Mutex
	network *verdict.Network // nil: the control plane has not said
	changed chan struct{}    // closed when network is another
	holder  *hold.Holder     // nil: none is at work
	why     error            // why none is
}

func newSynHold(cfg hold.Config, asker destinations, v *verdicts.Holder, logger *slog.Logger) *synHold {
	cfg.Forgotten = asker.Forget
	return &synHold{cfg: cfg, asker: asker, verdicts: v, logger: logger, changed: make(chan struct{}),
		why: errors.New("the control plane has not said what the cluster is")}
}

// shut closes the pod until a Holder is at work: every connection is refused. Where the table of an agent before this one is still there it
// stays: it holds what it does not know.
func shut(cfg hold.Config) error {
	there, err := hold.There()
	if err != nil || there {
		return err
	}
	return hold.Shut(cfg)
}

// applyNetwork takes over a mantlet.v1.Network.
func (s *synHold) applyNetwork(b []byte) error {
	n, err := wire.UnmarshalNetwork(b)
	if err != nil {
		return err
	}
	s.table.Lock() // no Holder is opened or closed meanwhile
	defer s.table.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	before := s.network
	s.network = &n
	if before != nil && s.holder != nil && onlyServicesDiffer(before, &n) && s.holder.SetServices(n.Services) == nil {
		return nil // what is known of destinations stays
	}
	close(s.changed)
	s.changed = make(chan struct{})
	return nil
}

// onlyServicesDiffer reports whether what is known of one network is of use in another.
func onlyServicesDiffer(a, b *verdict.Network) bool {
	return slices.Equal(a.Cluster, b.Cluster) && slices.Equal(a.Node, b.Node) && a.NodePortRange() == b.NodePortRange()
}

// applyVerdicts takes over a mantlet.v1.Verdicts, for all who decide by it. When it returns nil the kernel has what it says of addresses
// outside the cluster, so that the ACK says so too.
func (s *synHold) applyVerdicts(b []byte) error {
	return errors.Join(s.verdicts.Apply(b), s.put())
}

// put puts the verdicts in force into the hold. Where no Holder is at work the next one begins with them.
func (s *synHold) put() error {
	h, _ := s.current()
	v := s.verdicts.Current()
	if h == nil || v == nil {
		return nil
	}
	return errors.Join(h.SetExternal(v.Verdicts.Egress), h.SetInbound(v.Verdicts.Ingress))
}

// flip puts new answers in force, for destinations that were asked about.
func (s *synHold) flip(answers map[netip.AddrPort]relay.Verdict) {
	h, _ := s.current()
	if h == nil {
		return // nothing is known of any destination
	}
	known := map[netip.AddrPort]bool{}
	var unknown []netip.AddrPort
	for dest, v := range answers {
		if v == relay.Unknown {
			unknown = append(unknown, dest)
		} else {
			known[dest] = v == relay.Allowed
		}
	}
	if err := h.Flip(known, unknown...); err != nil {
		s.logger.Error("hold: new verdicts cannot be written", "destinations", len(answers), "error", err)
	}
}

func (s *synHold) current() (*hold.Holder, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.holder, s.why
}

func (s *synHold) set(h *hold.Holder, why error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.holder, s.why = h, why
}

const (
	holdFailures = 8 // in a row, after which the agent gives up
	holdSteady   = time.Minute
	holdPause    = 20 * time.Millisecond // after the first failure, doubled with each
)

// run holds SYNs until ctx ends (nil) or that fails again and again.
func (s *synHold) run(ctx context.Context) error {
	failures := 0
	for {
		s.mu.Lock()
		network, changed := s.network, s.changed
		s.mu.Unlock()
		var err error
		began := time.Now()
		if network != nil {
			err = s.work(ctx, *network, changed)
		} else {
			select {
			case <-changed:
			case <-ctx.Done():
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // what fails at the end is the end
		case err == nil:
			failures = 0
			continue
		case time.Since(began) > holdSteady:
			failures = 0
		}
		if failures++; failures >= holdFailures {
			return fmt.Errorf("the SYN hold failed %d times in a row: %w", failures, err)
		}
		s.logger.Error("hold: failed; unknown destinations stay held until it is at work again", "cause", err)
		select {
		case <-time.After(holdPause << failures):
		case <-ctx.Done():
			return nil
		}
	}
}

// work runs one Holder until ctx ends or the network is another (nil), or it fails.
func (s *synHold) work(ctx context.Context, n verdict.Network, changed <-chan struct{}) error {
	h, err := s.open(n)
	if err != nil {
		s.set(nil, err)
		return err
	}
	defer s.close(h)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- h.Run(ctx) }()
	if err := s.put(); err != nil { // what came while it was opened
		cancel()
		return errors.Join(err, <-ended)
	}
	select {
	case err = <-ended:
		return err
	case <-changed:
		cancel()
		return <-ended
	}
}

func (s *synHold) open(n verdict.Network) (*hold.Holder, error) {
	s.table.Lock()
	defer s.table.Unlock()
	c := s.cfg
	c.Cluster, c.Exempt, c.Services, c.NodePorts = n.Cluster, n.Node, n.Services, n.NodePortRange()
	if v := s.verdicts.Current(); v != nil {
		c.External, c.Inbound = v.Verdicts.Egress, v.Verdicts.Ingress
	}
	h, err := hold.Open(c, s.asker, s.logger)
	if err == nil {
		s.set(h, nil)
	}
	return h, err
}

func (s *synHold) close(h *hold.Holder) {
	s.table.Lock()
	defer s.table.Unlock()
	s.set(nil, errors.New("it is being opened again"))
	h.Close()
}

// Check fails unless a Holder is at work and its table as it should be.
func (s *synHold) Check() error {
	s.table.Lock()
	defer s.table.Unlock()
	h, why := s.current()
	switch {
	case h == nil:
		return fmt.Errorf("hold: not in place: %w", why)
	case !h.Running():
		return errors.New("hold: it does not run yet")
	}
	return h.Check()
}

// heldTable is the hold's table for netfilter.Guard. Where no Holder is at work there only has to be one.
type heldTable struct{ *synHold }

var _ netfilter.Table = heldTable{}

func (s heldTable) Name() string { return hold.TableName }

func (s heldTable) Wrote(port uint32) bool {
	h, _ := s.current()
	return h != nil && h.Wrote(port)
}

func (s heldTable) Check() error {
	s.table.Lock()
	defer s.table.Unlock()
	if h, _ := s.current(); h != nil {
		return h.Check()
	}
	if there, err := hold.There(); err != nil || there {
		return err
	}
	return fmt.Errorf("hold: table inet %s is gone", hold.TableName)
}

func (s heldTable) Repair() error {
	s.table.Lock()
	defer s.table.Unlock()
	if h, _ := s.current(); h != nil {
		return h.Repair()
	}
	return shut(s.cfg)
}

// refused writes down what the hold refuses.
func (a *agent) refused(r hold.Refusal) {
	direction := flows.Outbound
	if r.Inbound {
		direction = flows.Inbound
	}
	a.flows.Refused(direction, r.Source, r.Destination)
}
