package hold

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// sender sends whole packets, marked with Mark.
type sender struct{ v4, v6 int }

func newSender() (*sender, error) {
	v4, err := rawSocket(unix.AF_INET)
	if err != nil {
		return nil, err
	}
	v6, err := rawSocket(unix.AF_INET6)
	if err != nil && !errors.Is(err, unix.EAFNOSUPPORT) { // a kernel without IPv6 has no SYNs over it
		_ = unix.Close(v4)
		return nil, err
	}
	return &sender{v4, v6}, nil
}

func rawSocket(family int) (int, error) {
	// IPPROTO_RAW: packets come with their header, and none are received.
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return -1, fmt.Errorf("hold: open a raw socket (needs CAP_NET_RAW): %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, Mark); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("hold: mark the raw socket (needs CAP_NET_ADMIN): %w", err)
	}
	return fd, nil
}

// send sends a SYN once more. EPERM is what the kernel says where the table answered it with a reset, so that is success.
func (s *sender) send(p syn) error {
	var err error
	if a := p.dest.Addr(); a.Is4() {
		err = unix.Sendto(s.v4, p.packet, unix.MSG_DONTWAIT, &unix.SockaddrInet4{Addr: a.As4()})
	} else {
		err = unix.Sendto(s.v6, p.packet, unix.MSG_DONTWAIT, &unix.SockaddrInet6{Addr: a.As16()})
	}
	if err != nil && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("hold: send the SYN to %s again: %w", p.dest, err)
	}
	return nil
}

func (s *sender) close() {
	_ = unix.Close(s.v4)
	if s.v6 >= 0 {
		_ = unix.Close(s.v6)
	}
}
