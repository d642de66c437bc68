package hammer

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"time"
)

const (
	// datagramPatience bounds one exchange. It is short, because one that is denied at the other end ends in silence: policy must not have changed
	// meanwhile for it to prove anything.
	datagramPatience = 300 * time.Millisecond
	// muteAtMost is how many exchanges in a row may get no answer on a machine that has much to do: 6 seconds.
	muteAtMost = 20
)

// sockets are the sockets by which a peer sends datagrams, one for each target: so that the flows live through many states of policy.
type sockets map[netip.AddrPort]net.Conn

// ask sends a datagram and returns the answer to it. Those to earlier ones, which came too late, are left out.
func (s sockets) ask(to netip.AddrPort, nonce string) (string, error) {
	c := s[to]
	if c == nil {
		var err error
		if c, err = net.Dial("udp", to.String()); err != nil { //nolint:noctx // it sends nothing
			return "", err
		}
		s[to] = c
	}
	if _, err := c.Write([]byte(nonce)); err != nil {
		return "", err // EPERM: the pod's own policy
	}
	deadline := time.Now().Add(datagramPatience)
	_ = c.SetReadDeadline(deadline)
	buf := make([]byte, 64)
	for {
		n, err := c.Read(buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return "", err
		case err != nil: // told of an earlier one, by ICMP
			if time.Now().After(deadline) {
				return "", err
			}
			continue
		}
		if got := string(buf[:n]); !late(got, nonce) {
			return got, nil
		}
	}
}

// late reports whether an answer is to another nonce of the same socket.
func late(answer, nonce string) bool {
	return len(answer) < len(nonce) || answer[len(answer)-len(nonce):] != nonce
}

func (s sockets) close() {
	for _, c := range s {
		c.Close()
	}
}
