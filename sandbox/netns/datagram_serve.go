package netns

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// datagramSocket is a UDP port of one family. Everything that arrives is written down before it is answered; the answer goes out from the
// very address that was asked, which for a socket that is bound to all addresses has to be said.
type datagramSocket struct {
	server *server
	port   uint16
	conn   *net.UDPConn
	raw    syscall.RawConn

	mu   sync.Mutex // from taking a datagram off the socket until it is written down
	seen []Arrival
}

// mostArrivals bounds what a socket writes down until it is asked; what is beyond counts as lost.
const mostArrivals = 1 << 16

// receive opens a port, in both families unless it is bound to one address.
func (s *server) receive(ctx context.Context, p Port) error {
	hosts := []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	if p.Bind.IsValid() {
		hosts = []netip.Addr{p.Bind}
	}
	for _, host := range hosts {
		network := "udp6" // of Go: IPv6 only
		if host.Is4() {
			network = "udp4"
		}
		config := net.ListenConfig{Control: tellDestination}
		c, err := config.ListenPacket(ctx, network, netip.AddrPortFrom(host, p.Number).String())
		if err != nil {
			return err
		}
		conn := c.(*net.UDPConn)
		raw, err := conn.SyscallConn()
		if err != nil {
			return errors.Join(err, conn.Close())
		}
		s.sockets = append(s.sockets, &datagramSocket{server: s, port: p.Number, conn: conn, raw: raw})
	}
	return nil
}

func (s *server) closeSockets() error {
	var errs []error
	for _, d := range s.sockets {
		errs = append(errs, d.conn.Close())
	}
	return errors.Join(errs...)
}

// tellDestination asks the kernel for the address that each datagram was sent to.
func tellDestination(network, _ string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		if network == "udp4" {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		} else {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		}
	})
	return errors.Join(err, failed)
}

// serve answers until the process ends.
func (d *datagramSocket) serve() {
	for {
		err := d.raw.Read(func(fd uintptr) bool {
			return !errors.Is(d.take(int(fd)), unix.EAGAIN) // until then, wait for more
		})
		if err != nil {
			return // closed
		}
	}
}

// take takes one datagram off the socket, writes it down and answers it. An error of the socket is of a datagram that was sent before.
func (d *datagramSocket) take(fd int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	payload, control := make([]byte, len(datagramStart)+longestNonce+1), make([]byte, 128)
	n, controls, _, from, err := unix.Recvmsg(fd, payload, control, unix.MSG_DONTWAIT)
	if err != nil {
		return err
	}
	nonce, ok := strings.CutPrefix(string(payload[:n]), datagramStart)
	client := addrPort(from)
	if !ok || !client.IsValid() {
		return nil
	}
	if len(d.seen) <= mostArrivals { // one more than may be: that it was too many is seen by that
		d.seen = append(d.seen, Arrival{Nonce: nonce, Port: d.port, From: client})
	}
	text, err := json.Marshal(Answer{Pod: d.server.name, Port: d.port, Nonce: nonce, Seen: client})
	if err != nil {
		return nil
	}
	// Not sent: no room, or refused by the packet filter. The client finds no answer, and the datagram stands in the list.
	_ = unix.Sendmsg(fd, text, sameSource(control[:controls]), from, unix.MSG_DONTWAIT)
	return nil
}

// sameSource makes of the control messages that came with a datagram those that send from the address that it was sent to.
func sameSource(control []byte) []byte {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		switch {
		case m.Header.Level == unix.IPPROTO_IP && m.Header.Type == unix.IP_PKTINFO && len(m.Data) >= unix.SizeofInet4Pktinfo:
			return unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: [4]byte(m.Data[8:12])}) // ifindex, spec_dst, addr
		case m.Header.Level == unix.IPPROTO_IPV6 && m.Header.Type == unix.IPV6_PKTINFO && len(m.Data) >= unix.SizeofInet6Pktinfo:
			return unix.PktInfo6(&unix.Inet6Pktinfo{Addr: [16]byte(m.Data[:16])}) // addr, ifindex
		}
	}
	return nil
}

func addrPort(s unix.Sockaddr) netip.AddrPort {
	switch a := s.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(a.Addr), uint16(a.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(a.Addr).Unmap(), uint16(a.Port))
	}
	return netip.AddrPort{}
}

// arrivals empties the sockets, whatever the goroutines that serve them have got round to, and then the lists.
func (s *server) arrivals() (*Arrivals, error) {
	out := &Arrivals{}
	for _, d := range s.sockets {
		if err := d.drain(); err != nil {
			return nil, fmt.Errorf("UDP port %d: %w", d.port, err)
		}
		d.mu.Lock()
		if len(d.seen) > mostArrivals {
			out.Lost++
		}
		out.Datagrams = append(out.Datagrams, d.seen...)
		d.seen = nil
		d.mu.Unlock()
	}
	dropped, err := s.droppedDatagrams()
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	out.Lost += dropped - s.dropped
	s.dropped = dropped
	return out, nil
}

// drain takes datagrams off the socket until there is none.
func (d *datagramSocket) drain() error {
	var taken error
	err := d.raw.Control(func(fd uintptr) {
		for taken == nil || errors.Is(taken, unix.EINTR) {
			taken = d.take(int(fd))
		}
	})
	if err == nil && !errors.Is(taken, unix.EAGAIN) {
		err = taken
	}
	return err
}

// droppedDatagrams counts what the kernel has thrown away at the server's own sockets since they were opened: the last column of lines
// whose second one is "00000000:0035", an address and a port.
func (s *server) droppedDatagrams() (int, error) {
	own := map[string]bool{}
	for _, d := range s.sockets {
		own[fmt.Sprintf("%04X", d.port)] = true
	}
	sum := 0
	for _, file := range []string{"/proc/thread-self/net/udp", "/proc/thread-self/net/udp6"} {
		text, err := os.ReadFile(file)
		if err != nil {
			return 0, err
		}
		for i, line := range strings.Split(strings.TrimSpace(string(text)), "\n") {
			fields := strings.Fields(line)
			if i == 0 || len(fields) < 2 {
				continue
			}
			if _, port, ok := strings.Cut(fields[1], ":"); !ok || !own[port] {
				continue
			}
			n, err := strconv.Atoi(fields[len(fields)-1])
			if err != nil {
				return 0, fmt.Errorf("%s: %q: %w", file, line, err)
			}
			sum += n
		}
	}
	return sum, nil
}
