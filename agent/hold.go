package agent

import (
	"errors"
	"fmt"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/xds/proxyuser"
)

// held are sockets that keep ports for one user.
type held []int

// holdPorts binds TCP ports, on all addresses, for a user: only sockets of that user that ask for SO_REUSEPORT, as Envoy's do, can be bound
// there too. The sockets do not listen, so that connections are refused as long as nothing else does.
//
// Without it an app could take a capture port while Envoy is away, and would get what is redirected there, past all policy. Where the
// app is the same user as Envoy nothing can keep it from that.
func holdPorts(user proxyuser.User, ports ...uint16) (held, error) {
	var h held
	for _, port := range ports {
		fd, err := holdPort(user, port)
		if err != nil {
			h.close()
			if errors.Is(err, unix.EADDRINUSE) {
				return nil, fmt.Errorf("port %d, where the pod's traffic is redirected to, is taken by another process of the pod; it must not listen there", port)
			}
			return nil, fmt.Errorf("hold port %d: %w", port, err)
		}
		h = append(h, fd)
	}
	return h, nil
}

func (h held) close() {
	for _, fd := range h {
		_ = unix.Close(fd)
	}
}

func holdPort(user proxyuser.User, port uint16) (fd int, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and its user with it
		// A socket belongs to the user that its thread has for files at the time.
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETFSUID, uintptr(user.UID), 0, 0); errno != 0 {
			fd, err = -1, errno
			return
		}
		fd, err = bound(port)
	}()
	<-done
	return fd, err
}

func bound(port uint16) (int, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	var address unix.Sockaddr = &unix.SockaddrInet6{Port: int(port)}
	if errors.Is(err, unix.EAFNOSUPPORT) { // a kernel without IPv6
		address = &unix.SockaddrInet4{Port: int(port)}
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	} else if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
	}
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	}
	if err == nil {
		err = unix.Bind(fd, address)
	}
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return -1, err
	}
	return fd, nil
}
