package revoke

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ends are the two ends of a socket.
type ends struct{ local, remote netip.AddrPort }

// socket is a TCP socket as the kernel has it.
type socket struct {
	ends   ends
	cookie [8]byte // tells it from any other socket that has, had or will have the same ends
	state  uint8
	uid    uint32
	inode  uint32 // 0: no process has it any more
	mark   uint32
}

// TCP states (include/net/tcp_states.h).
const (
	established = 1
	finWait1    = 4
	finWait2    = 5
	closeWait   = 8
	lastAck     = 9
	listening   = 10
	closing     = 11
)

// alive are the states in which data may still pass.
const alive = 1<<established | 1<<finWait1 | 1<<finWait2 | 1<<closeWait | 1<<lastAck | 1<<closing

func (s *socket) alive() bool { return 1<<s.state&alive != 0 }

// sockets speaks sock_diag(7) in one network namespace. It is safe for concurrent use.
type sockets struct {
	mu     sync.Mutex
	conn   *netlink.Conn
	closed bool
	others func([]Socket) []error // who destroys; nil: this one
}

// openSockets fails where sockets cannot be destroyed, so that nobody relies on it. Where others do that they are not asked now.
func openSockets(others func([]Socket) []error) (*sockets, error) {
	s := &sockets{others: others}
	if err := s.dial(); err != nil || others != nil {
		return s, err
	}
	// Nobody has this socket. A kernel that could destroy it says so.
	nobody := ends{netip.MustParseAddrPort("0.0.0.0:0"), netip.MustParseAddrPort("0.0.0.0:0")}
	if err := s.destroy([]socket{{ends: nobody}})[0]; err != nil && !errors.Is(err, unix.ENOENT) {
		s.close()
		return nil, fmt.Errorf("revoke: open connections cannot be cut (needs CAP_NET_ADMIN and CONFIG_INET_DIAG_DESTROY): %w", err)
	}
	return s, nil
}

func (s *sockets) dial() error {
	if s.closed {
		return errors.New("revoke: closed")
	}
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return fmt.Errorf("revoke: open sock_diag: %w", err)
	}
	s.conn = conn
	return conn.SetReadBuffer(batch * answerSize)
}

func (s *sockets) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	_ = s.conn.Close()
}

// The layout of inet_diag_req_v2 and inet_diag_msg (include/uapi/linux/inet_diag.h). Ports and addresses are in network order, the
// rest is in the machine's.
const (
	requestSize = 56
	messageSize = 72
	idSize      = 48      // inet_diag_sockid, at 8 of a request and at 4 of a message
	attrMark    = 15      // INET_DIAG_MARK
	batch       = 64      // requests in one message to the kernel
	answerSize  = 8 << 10 // what one answer may take of the socket's buffer
)

// answerPatience bounds the wait for an answer that the kernel has given before the call returned.
const answerPatience = time.Second

// anyCookie is INET_DIAG_NOCOOKIE twice.
var anyCookie = [8]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func request(family uint8, states uint32, e ends, cookie [8]byte) []byte {
	b := make([]byte, requestSize)
	b[0], b[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[4:], states)
	id := b[8:]
	if e.local.IsValid() {
		binary.BigEndian.PutUint16(id[0:], e.local.Port())
		binary.BigEndian.PutUint16(id[2:], e.remote.Port())
		copy(id[4:20], e.local.Addr().AsSlice())
		copy(id[20:36], e.remote.Addr().AsSlice())
	}
	copy(id[40:48], cookie[:])
	return b
}

// family of the request; an IPv4 connection of a socket for both families is found as IPv4.
func family(e ends) uint8 {
	if e.local.Addr().Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// find looks sockets up, exactly. One that is not there, is done or only listens is nil.
func (s *sockets) find(list []ends) ([]*socket, error) {
	found := make([]*socket, len(list))
	requests := make([]netlink.Message, len(list))
	for i, e := range list {
		requests[i] = netlink.Message{
			Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request},
			Data:   request(family(e), 0, e, anyCookie),
		}
	}
	var broken error
	s.exchange(requests, func(i int, m *netlink.Message, err error) {
		switch {
		case errors.Is(err, unix.ENOENT):
		case err != nil:
			broken = fmt.Errorf("revoke: look up a socket: %w", err)
		case m != nil:
			if k, err := parse(m.Data); err != nil {
				broken = err
			} else if k.alive() && k.ends == list[i] {
				found[i] = &k
			}
		}
	})
	return found, broken
}

// destroy resets sockets: both their owners and the far ends learn it at once. There is an error for each that failed; ENOENT and ESTALE:
// it is gone already.
func (s *sockets) destroy(list []socket) []error {
	if s.others != nil {
		return s.delegate(list)
	}
	errs := make([]error, len(list))
	requests := make([]netlink.Message, len(list))
	for i, k := range list {
		requests[i] = netlink.Message{
			Header: netlink.Header{Type: unix.SOCK_DESTROY, Flags: netlink.Request | netlink.Acknowledge},
			Data:   request(family(k.ends), 0, k.ends, k.cookie),
		}
	}
	s.exchange(requests, func(i int, _ *netlink.Message, err error) { errs[i] = err })
	return errs
}

// exchange sends requests, some at a time, and hands on the one answer to each. The kernel answers in order.
func (s *sockets) exchange(requests []netlink.Message, answer func(i int, m *netlink.Message, err error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for first := 0; first < len(requests); first += batch {
		part := requests[first:min(first+batch, len(requests))]
		_ = s.conn.SetReadDeadline(time.Now().Add(answerPatience))
		_, err := s.conn.SendMessages(part)
		for i := range part {
			var m *netlink.Message
			failure := err
			if err == nil {
				var got []netlink.Message
				got, failure = s.conn.Receive()
				if len(got) > 0 {
					m = &got[0]
				}
				if !theKernels(failure) {
					err = failure // answers are missing: what comes next would be taken for what it is not
				}
			}
			answer(first+i, m, failure)
		}
		if err != nil {
			_ = s.conn.Close()
			if err := s.dial(); err != nil {
				for i := first + len(part); i < len(requests); i++ {
					answer(i, nil, err)
				}
				return
			}
		}
	}
}

// theKernels reports whether an error is the kernel's answer to a request, or none.
func theKernels(err error) bool {
	var errno unix.Errno
	return err == nil || errors.As(err, &errno) && errno != unix.ENOBUFS
}

// list dumps the TCP sockets of the namespace through which data may pass.
func (s *sockets) list() ([]socket, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.conn.SetReadDeadline(time.Time{})
	list, err := dump(s.conn, alive)
	if err != nil {
		return nil, fmt.Errorf("revoke: %w", err)
	}
	return list, nil
}

// dump asks for all sockets that are in one of some states. Others cost the kernel a look at most.
func dump(conn *netlink.Conn, states uint32) ([]socket, error) {
	var out []socket
	for _, f := range []uint8{unix.AF_INET, unix.AF_INET6} {
		got, err := conn.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.SOCK_DIAG_BY_FAMILY, Flags: netlink.Request | netlink.Dump},
			Data:   request(f, states, ends{}, anyCookie),
		})
		if errors.Is(err, unix.ENOENT) { // a kernel without IPv6
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list sockets: %w", err)
		}
		for _, m := range got {
			k, err := parse(m.Data)
			if err != nil {
				return nil, err
			}
			out = append(out, k)
		}
	}
	return out, nil
}

// Listener is a TCP socket that listens. Address is unspecified where it does so on all of a family, or of both.
type Listener struct {
	Address netip.AddrPort
	UID     uint32
}

// Listeners are the TCP sockets that listen in the calling thread's network namespace. Nobody needs a capability to ask, and connections, however many there
// are, cost nothing, as they would in /proc/net/tcp.
func Listeners() ([]Listener, error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("open sock_diag: %w", err)
	}
	defer func() { _ = conn.Close() }()
	list, err := dump(conn, 1<<listening)
	if err != nil {
		return nil, err
	}
	out := make([]Listener, len(list))
	for i, k := range list {
		out[i] = Listener{Address: k.ends.local, UID: k.uid}
	}
	return out, nil
}

func parse(b []byte) (socket, error) {
	if len(b) < messageSize {
		return socket{}, fmt.Errorf("the kernel tells of a socket in %d bytes, not %d", len(b), messageSize)
	}
	family := b[0]
	k := socket{state: b[1]}
	id := b[4 : 4+idSize]
	k.ends.local = netip.AddrPortFrom(addr(family, id[4:20]), binary.BigEndian.Uint16(id[0:]))
	k.ends.remote = netip.AddrPortFrom(addr(family, id[20:36]), binary.BigEndian.Uint16(id[2:]))
	copy(k.cookie[:], id[40:48])
	k.uid = binary.NativeEndian.Uint32(b[64:])
	k.inode = binary.NativeEndian.Uint32(b[68:])
	attrs, err := netlink.NewAttributeDecoder(b[messageSize:])
	if err != nil {
		return socket{}, fmt.Errorf("attributes of a socket: %w", err)
	}
	for attrs.Next() {
		if attrs.Type() == attrMark {
			k.mark = attrs.Uint32()
		}
	}
	return k, attrs.Err()
}

func addr(family uint8, b []byte) netip.Addr {
	if family == unix.AF_INET {
		return netip.AddrFrom4([4]byte(b[:4]))
	}
	return netip.AddrFrom16([16]byte(b)).Unmap()
}
