package netfilter

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"

	"github.com/google/nftables"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Config says where TCP is redirected to and whose connections are exempt.
type Config struct {
	InboundPort  uint16 // where TCP that arrives at the pod goes
	OutboundPort uint16 // where TCP that the pod's processes send goes
	// Mark exempts connections whose socket carries it: the agent's own, and Envoy's where the kernel gives the pod one user only.
	Mark uint32
	// Users exempt the connections of whoever is both one of these users and of its group.
	Users []proxyuser.User
	// Node are addresses of the pod's own node, from which TCP is not redirected; see SetNode.
	Node []netip.Addr
	// Services are those at the node's addresses, with its host ports, and NodePorts the range of its node ports: what comes from there is redirected all the same.
	Services  []netip.AddrPort
	NodePorts verdict.PortRange
	// Marked are users whose packets get Mark, so that whoever exempts the mark exempts them: for agents that may not set it.
	Marked []proxyuser.User
}

// ByUser is the configuration for an Envoy that runs as a user.
func ByUser(u proxyuser.User) Config {
	c := ByMark()
	c.Users = []proxyuser.User{u}
	return c
}

// ByNode is the configuration for an Envoy and an agent that both run as a user, without privileges.
func ByNode(u proxyuser.User) Config {
	c := ByUser(u)
	c.Marked = c.Users
	return c
}

// ByMark is the configuration for an Envoy whose sockets carry names.ProxyMark.
func ByMark() Config {
	return Config{InboundPort: names.InboundPort, OutboundPort: names.OutboundPort, Mark: names.ProxyMark, NodePorts: verdict.DefaultNodePorts}
}

// Redirect is the table of one pod. Its methods work in the network namespace of the thread that calls the first of them.
type Redirect struct {
	logger *slog.Logger
	conn   *Conn

	mu     sync.Mutex // held while the table is written or read
	cfg    Config
	judged bool // nothing passes that was let through before cfg.Node
}

// New returns the Redirect of a configuration; the kernel is not asked yet. It fails for a configuration that redirects nowhere
// or exempts every unmarked socket.
func New(cfg Config, logger *slog.Logger) (*Redirect, error) {
	switch {
	case cfg.InboundPort == 0 || cfg.OutboundPort == 0:
		return nil, fmt.Errorf("redirect: ports %d and %d: both must be set", cfg.InboundPort, cfg.OutboundPort)
	case cfg.InboundPort == cfg.OutboundPort:
		return nil, fmt.Errorf("redirect: port %d cannot take both directions", cfg.InboundPort)
	case cfg.Mark == 0:
		return nil, errors.New("redirect: mark 0 is the mark of every ordinary socket; choose another")
	}
	cfg.Users, cfg.Marked, cfg.Node = slices.Clone(cfg.Users), slices.Clone(cfg.Marked), slices.Clone(cfg.Node)
	return &Redirect{cfg: cfg, logger: logger, conn: NewConn()}, nil
}

// Apply writes the table, in one transaction, whether or not there is one already.
func (r *Redirect) Apply() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.write()
}

func (r *Redirect) write() error {
	if err := r.conn.Do(r.rewrite); err != nil {
		return fmt.Errorf("redirect: write table inet %s (needs CAP_NET_ADMIN and nf_tables with NAT and conntrack timeouts in the kernel): %w", tableName, err)
	}
	return nil
}

func (r *Redirect) rewrite(conn *nftables.Conn) error {
	// Adding a table that exists changes nothing, deleting one that does not is an error: so add, delete, add.
	conn.AddTable(table())
	conn.DelTable(table())
	conn.AddTable(table())
	addTimeouts(conn)
	for _, want := range r.cfg.chains() {
		conn.AddChain(want.Chain)
		for _, exprs := range want.Rules {
			conn.AddRule(&nftables.Rule{Table: want.Table, Chain: want.Chain, Exprs: exprs})
		}
	}
	return conn.Flush()
}

// Close closes the connection to the kernel. The table stays.
func (r *Redirect) Close() { r.conn.Close() }

// Remove deletes the table. The pod's TCP then passes by Envoy. It is no error if there is no table.
func (r *Redirect) Remove() error {
	err := r.conn.Do(func(conn *nftables.Conn) error {
		conn.DelTable(table())
		return conn.Flush()
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("redirect: delete table inet %s: %w", tableName, err)
	}
	return nil
}

// Wrote implements Table.
func (r *Redirect) Wrote(port uint32) bool { return r.conn.Wrote(port) }

// Name is the table's.
func (r *Redirect) Name() string { return tableName }

// Check reads the table back and fails where it is not what Apply writes: a chain or a rule is missing, changed, added or in
// another place.
func (r *Redirect) Check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := (Layout{Table: tableName, Chains: r.cfg.chains()}).Check(r.conn); err != nil {
		return fmt.Errorf("redirect: %w", err)
	}
	return nil
}

// Repair is Apply, for Guard.
func (r *Redirect) Repair() error { return r.Apply() }
