package link

import (
	"net"

	"golang.org/x/sys/unix"
)

// Credentials are those of the process at the other end of a unix socket, when it connected or, at the connecting end, when it began to listen
// (SO_PEERCRED of unix(7)).
func Credentials(conn *net.UnixConn) (cred *unix.Ucred, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, err
	}
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return nil, cerr
	}
	return cred, err
}
