package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Config of a Network. The zero value is good.
type Config struct {
	// Node4 and Node6 are the node's addresses. Zero: 10.64.0.1 and fd00:10:64::1.
	Node4, Node6 netip.Addr
	// ProbeTimeout bounds a try that has no timeout of its own. Zero: 5 s.
	ProbeTimeout time.Duration
	// ProbesInFlight is how many TCP targets one Probe tries at a time. Zero: 64. Datagrams cost nothing while they wait for an answer:
	// of UDP targets it is datagramsInFlight.
	ProbesInFlight int
	// Logger hears of details. Nil: nobody.
	Logger *slog.Logger
}

func (c Config) withDefaults() (Config, error) {
	if !c.Node4.IsValid() {
		c.Node4 = netip.AddrFrom4([4]byte{10, 64, 0, 1})
	}
	if !c.Node6.IsValid() {
		c.Node6 = netip.MustParseAddr("fd00:10:64::1")
	}
	if !c.Node4.Is4() || !c.Node6.Is6() || c.Node6.Is4In6() {
		return c, fmt.Errorf("node addresses %s and %s: one IPv4 and one IPv6 address are needed", c.Node4, c.Node6)
	}
	if c.ProbeTimeout < 0 || c.ProbesInFlight < 0 {
		return c, fmt.Errorf("probe timeout %s, %d probes in flight: give positive ones, or 0 for the default", c.ProbeTimeout, c.ProbesInFlight)
	}
	if c.ProbeTimeout == 0 {
		c.ProbeTimeout = 5 * time.Second
	}
	if c.ProbesInFlight == 0 {
		c.ProbesInFlight = 64
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

// Network is the node and everything that hangs on it. Its methods may be called from several goroutines.
type Network struct {
	config    Config
	enclosure Enclosure
	node      *os.File // this process's own network namespace

	servicesMu sync.Mutex
	table      int // which of tableNames is in force

	mu      sync.Mutex
	closed  bool
	hosts   map[string]*host      // by name
	claimed map[netip.Addr]string // pod address → name
	begun   sync.WaitGroup        // hosts that are being made
}

// current guards the node: there is one per process, as it is the process's own network namespace.
var current struct {
	sync.Mutex
	open  bool
	links int // names given so far; never reused, because the kernel takes its time to remove an interface
}

// New turns the network namespace of this process into a node. It works inside the enclosure only, once at a time.
func New(c Config) (*Network, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	enclosure, err := Enclosed()
	if err != nil {
		return nil, fmt.Errorf("make the sandbox's network: %w", err)
	}
	current.Lock()
	defer current.Unlock()
	if current.open {
		return nil, errors.New("make the sandbox's network: there is one already; close it first")
	}
	fd, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open the node's network namespace: %w", err)
	}
	n := &Network{config: c, enclosure: enclosure, node: os.NewFile(uintptr(fd), "node"),
		hosts: map[string]*host{}, claimed: map[netip.Addr]string{c.Node4: "the node", c.Node6: "the node"}}
	if err := n.prepareNode(); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare the node: %w", err), n.clearNode(), n.node.Close())
	}
	current.open = true
	return n, nil
}

// prepareNode gives the node its settings, addresses and an empty service table.
func (n *Network) prepareNode() error {
	log := n.config.Logger
	if err := raiseFileLimit(log); err != nil {
		return err
	}
	if err := apply(log, everywhere, ofNode); err != nil {
		return err
	}
	if err := linkNode(n.config.Node4, n.config.Node6); err != nil {
		return err
	}
	if err := n.SetServices(nil); err != nil {
		return err
	}
	return apply(log, ofConntrack)
}

func (n *Network) clearNode() error {
	return errors.Join(removeLinks(), clearTables(tableNames[:]...), unlinkNode(n.config.Node4, n.config.Node6))
}

// Enclosure describes where the network is.
func (n *Network) Enclosure() Enclosure { return n.enclosure }

// Addresses are the node's, which control planes listen on and pods reach.
func (n *Network) Addresses() (v4, v6 netip.Addr) { return n.config.Node4, n.config.Node6 }

// Probe tries targets from the node itself, as the kubelet does, from this process.
func (n *Network) Probe(ctx context.Context, targets []Target) ([]Outcome, error) {
	r, err := n.probeRequest(targets)
	if err != nil || len(targets) == 0 {
		return nil, err
	}
	outcomes := tryAll(ctx, r)
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("probe from the node: %w", err)
	}
	return outcomes, nil
}

func (n *Network) probeRequest(targets []Target) (*probeRequest, error) {
	for _, t := range targets {
		if !t.Addr.IsValid() || t.Addr.Port() == 0 {
			return nil, fmt.Errorf("probe %s: give an address and a port", t.Addr)
		}
		if t.Speaks != ClientFirst && t.Speaks != ServerFirst {
			return nil, fmt.Errorf("probe %s: say who speaks first (%q)", t.Addr, t.Speaks)
		}
		if err := t.checkDatagrams(); err != nil {
			return nil, fmt.Errorf("probe %s: %w", t.Addr, err)
		}
	}
	return &probeRequest{Targets: targets, InFlight: n.config.ProbesInFlight, Timeout: n.config.ProbeTimeout}, nil
}

// begin claims the name and addresses of a host to be made. The caller calls n.begun.Done when it is made, or could not be.
func (n *Network) begin(name string, addrs []netip.Addr) (link string, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return "", errors.New("the network is closed")
	}
	if _, taken := n.hosts[name]; taken {
		return "", errors.New("there is one of that name already")
	}
	for i, a := range addrs {
		if owner, taken := n.claimed[a]; taken {
			for _, mine := range addrs[:i] {
				delete(n.claimed, mine)
			}
			return "", fmt.Errorf("address %s belongs to %s", a, owner)
		}
		n.claimed[a] = name
	}
	n.hosts[name] = nil // taken, not there yet
	n.begun.Add(1)
	current.Lock()
	defer current.Unlock()
	current.links++
	return fmt.Sprintf("p%d", current.links), nil
}

func (n *Network) forget(name string, addrs []netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.hosts, name)
	for _, a := range addrs {
		delete(n.claimed, a)
	}
}

// remove takes one host away: processes, link, namespace. If somebody else has done so, or does now, it does nothing.
func (n *Network) remove(h *host, addrs []netip.Addr) error {
	n.mu.Lock()
	if n.closed || n.hosts[h.name] != h {
		n.mu.Unlock()
		return nil
	}
	n.hosts[h.name] = nil
	n.begun.Add(1)
	n.mu.Unlock()
	defer n.begun.Done()

	h.end()
	err := n.sweep([]*host{h})
	err = errors.Join(err, removeLink(h.link), h.ns.Close())
	n.forget(h.name, addrs)
	return err
}

// Close ends every process in pods and outside, and takes links, routes, services and addresses away. To end agents gracefully, stop
// them before. Without Close (after a kill) the kernel does all of it.
func (n *Network) Close() error {
	n.mu.Lock()
	if n.closed {
		n.mu.Unlock()
		return nil
	}
	n.closed = true
	n.mu.Unlock()
	n.begun.Wait()

	n.mu.Lock()
	hosts := make([]*host, 0, len(n.hosts))
	for _, h := range n.hosts {
		if h != nil {
			hosts = append(hosts, h)
		}
	}
	n.mu.Unlock()
	var ending sync.WaitGroup
	for _, h := range hosts {
		ending.Go(h.end)
	}
	ending.Wait()
	errs := []error{n.sweep(hosts), n.clearNode()}
	for _, h := range hosts {
		errs = append(errs, h.ns.Close())
	}
	errs = append(errs, n.node.Close())
	current.Lock()
	current.open = false
	current.Unlock()
	return errors.Join(errs...)
}
