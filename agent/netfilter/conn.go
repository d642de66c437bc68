package netfilter

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Conn is a connection to nftables, in the network namespace of the thread that first uses it. It is opened then, and stays open: when a socket
// of NETLINK_NETFILTER is closed the kernel waits, with the namespace's transactions locked out, until all is freed that earlier ones have
// deleted. That takes an RCU grace period, 6 to 16 ms where measured (Linux 6.18; nft_rcv_nl_event in net/netfilter/nf_tables_api.c), and would come
// before the ACK of each policy.
type Conn struct {
	options []nftables.ConnOption
	port    atomic.Uint32

	mu   sync.Mutex // held while it is used
	conn *nftables.Conn
}

// NewConn returns a Conn that is opened with options.
func NewConn(options ...nftables.ConnOption) *Conn {
	c := &Conn{}
	c.options = append(options, nftables.AsLasting(), WithPort(&c.port))
	return c
}

// Wrote reports whether a transaction was this connection's, by the port that the kernel names in what it tells of it.
func (c *Conn) Wrote(port uint32) bool { return port != 0 && port == c.port.Load() }

// WithPort notes a connection's netlink port when it is opened. The kernel names it in all that it tells of the connection's transactions (nlmsg_pid).
func WithPort(into *atomic.Uint32) nftables.ConnOption {
	return nftables.WithSockOptions(func(s *netlink.Conn) error {
		port, err := portOf(s)
		into.Store(port)
		return err
	})
}

func portOf(s *netlink.Conn) (port uint32, err error) {
	raw, err := s.SyscallConn()
	if err != nil {
		return 0, err
	}
	var at unix.Sockaddr
	if failed := raw.Control(func(fd uintptr) { at, err = unix.Getsockname(int(fd)) }); failed != nil {
		return 0, failed
	}
	if own, ok := at.(*unix.SockaddrNetlink); ok && err == nil {
		return own.Pid, nil
	}
	return 0, errors.Join(err, errors.New("no address of netlink"))
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
		c.port.Store(0) // somebody else may get it
		_ = c.conn.CloseLasting()
		c.conn = nil
	}
}
