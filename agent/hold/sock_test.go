package hold

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// originalDst asks conntrack for the destination before the translation.
func originalDst(fd int, v4 bool) string {
	const soOriginalDst = 80
	var buf [unix.SizeofSockaddrInet6]byte
	size := uint32(len(buf))
	level := unix.SOL_IPV6
	if v4 {
		level = unix.SOL_IP
	}
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), soOriginalDst,
		uintptr(unsafe.Pointer(&buf)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		return errno.Error()
	}
	port := binary.BigEndian.Uint16(buf[2:])
	if v4 {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(buf[4:8])), port).String()
	}
	return netip.AddrPortFrom(netip.AddrFrom16([16]byte(buf[8:24])), port).String()
}

// greet greets whoever connects with a word, until the test ends.
func greet(t testing.TB, l net.Listener, word string) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, word)
			_ = c.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
}
