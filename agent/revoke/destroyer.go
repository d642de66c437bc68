package revoke

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// Socket is a TCP socket of a network namespace, as the kernel knows it.
type Socket struct {
	Local, Remote netip.AddrPort
	Cookie        [8]byte // tells it from any other socket that has, had or will have the same ends
}

// delegate has others destroy sockets.
func (s *sockets) delegate(list []socket) []error {
	if len(list) == 0 {
		return nil
	}
	wanted := make([]Socket, len(list))
	for i, k := range list {
		wanted[i] = Socket{Local: k.ends.local, Remote: k.ends.remote, Cookie: k.cookie}
	}
	return s.others(wanted)
}

// Destroyer resets sockets for a Revoker that may not.
type Destroyer struct {
	kernel *sockets
	envoy  Owner
}

// OpenDestroyer opens the kernel's interface in the network namespace of the calling thread. Sockets that are not Envoy's are left alone.
func OpenDestroyer(envoy Owner) (*Destroyer, error) {
	k, err := openSockets(nil)
	if err != nil {
		return nil, err
	}
	return &Destroyer{kernel: k, envoy: envoy}, nil
}

// Close ends what OpenDestroyer began.
func (d *Destroyer) Close() { d.kernel.close() }

// Destroy resets sockets: both their owners and the far ends learn it at once. It returns an error for each that failed; ENOENT: it is gone
// already; EPERM: it is not Envoy's.
func (d *Destroyer) Destroy(list []Socket) []error {
	errs := make([]error, len(list))
	wanted := make([]ends, len(list))
	for i, s := range list {
		wanted[i] = ends{s.Local, s.Remote}
	}
	found, err := d.kernel.find(wanted)
	var doomed []socket
	var of []int
	for i, k := range found {
		switch {
		case err != nil:
			errs[i] = err
		case k == nil || k.cookie != list[i].Cookie:
			errs[i] = unix.ENOENT
		case !d.envoy(k):
			errs[i] = unix.EPERM
		default:
			doomed, of = append(doomed, *k), append(of, i)
		}
	}
	for i, err := range d.kernel.destroy(doomed) {
		errs[of[i]] = err
	}
	return errs
}
