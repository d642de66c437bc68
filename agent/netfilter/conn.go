package netfilter

import (
	"fmt"
	"sync"

	"github.com/google/nftables"
)

// Conn is a connection to nftables, in the network namespace of the thread that first uses it. It is opened then, and stays open: when a socket
// of NETLINK_NETFILTER is closed the kernel waits, with the namespace's transactions locked out, until all is freed that earlier ones have
// deleted. That takes an RCU grace period, 6 to 16 ms where measured (Linux 6.18; nft_rcv_nl_event in net/netfilter/nf_tables_api.c), and would come
// before the ACK of each policy.
type Conn struct {
	options []nftables.ConnOption

	mu   sync.Mutex // held while it is used
	conn *nftables.Conn
}

// NewConn returns a Conn that is opened with options.
func NewConn(options ...nftables.ConnOption) *Conn {
	return &Conn{options: append(options, nftables.AsLasting())}
}

// Do has f use the connection. After an error it is opened anew for the next: answers that nobody has read, and messages that nobody has sent,
// would be taken for those of what comes after them.
func (c *Conn) Do(f func(*nftables.Conn) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == nil {
		conn, err := nftables.New(c.options...)
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		c.conn = conn
	}
	err := f(c.conn)
	if err != nil {
		c.close()
	}
	return err
}

// Close closes the connection. It may be used again: then it is opened again.
func (c *Conn) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.close()
}

func (c *Conn) close() {
	if c.conn != nil {
		_ = c.conn.CloseLasting()
		c.conn = nil
	}
}
