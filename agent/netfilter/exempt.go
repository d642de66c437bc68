package netfilter

import (
	"context"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/xds/names"
)

// Exempt marks a socket with names.ProxyMark before it connects, so that the redirect lets it pass. It is a [net.Dialer]'s Control
// function and takes CAP_NET_ADMIN, or CAP_NET_RAW since Linux 5.17.
func Exempt(_, address string, conn syscall.RawConn) error {
	var err error
	if cerr := conn.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, names.ProxyMark)
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("mark the connection to %s as the proxy's (needs CAP_NET_ADMIN): %w", address, err)
	}
	return nil
}

// Dial connects past the redirect. So does its resolver: DNS over TCP would be captured like any TCP.
func Dial(ctx context.Context, network, address string) (net.Conn, error) {
	marked := net.Dialer{Control: Exempt}
	marked.Resolver = &net.Resolver{PreferGo: true, Dial: (&net.Dialer{Control: Exempt}).DialContext}
	return marked.DialContext(ctx, network, address)
}
