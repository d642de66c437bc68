// Package podtest gives tests the surroundings of a pod: a network namespace for the whole test process, and a second one for what is
// outside.
//
//	test process = pod                outside
//	lo   eth0 10.99.0.2 ─── veth ─── 10.99.0.1
//	          fd99::2                fd99::1
//
// Both end with the process; nothing has a name that could stay behind.
package podtest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The addresses of the two ends.
var (
	PodIPv4     = netip.MustParseAddr("10.99.0.2")
	PodIPv6     = netip.MustParseAddr("fd99::2")
	OutsideIPv4 = netip.MustParseAddr("10.99.0.1")
	OutsideIPv6 = netip.MustParseAddr("fd99::1")
)

// inside is set in the environment of the process that has its own network namespace.
const inside = "MANTLET_PODTEST_INSIDE"

// Main runs the tests of a package in fresh network and mount namespaces, in a copy of the test process, and returns the exit code for
// TestMain. Whoever is not root gets a user namespace as well, in which there is one user only.
func Main(m *testing.M) int {
	if os.Getenv(inside) != "" {
		err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") // what tests mount stays here
		if err == nil {
			err = up(netlink.Handle{}, "lo")
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "podtest:", err)
			return 1
		}
		return m.Run()
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...) //nolint:noctx // it lives as long as this process
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	runtime.LockOSThread() // Pdeathsig is about the thread that starts the child
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return exit.ExitCode()
	case errors.As(err, &exit):
		fmt.Fprintln(os.Stderr, "podtest: the tests ended by", exit)
	default:
		fmt.Fprintf(os.Stderr, "podtest: these tests need a network namespace and the kernel allows none (%v): run them with sudo\n", err)
	}
	return 1
}

// SingleUser reports whether the tests run in a user namespace that maps one user only.
func SingleUser() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return false
	}
	var in, out, size uint64
	if _, err := fmt.Sscan(string(b), &in, &out, &size); err != nil {
		return false
	}
	return size == 1
}

// Outside is the network namespace at the other end of the pod's eth0.
type Outside struct{ ns netns.NsHandle }

// Connect gives the pod its eth0 and returns what is at its other end. Both go away with the test.
func Connect(t testing.TB) *Outside {
	t.Helper()
	ns, err := newNamespace()
	if err != nil {
		t.Fatalf("podtest: make the outside: %v", err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	here, err := netlink.NewHandle()
	if err != nil {
		t.Fatal(err)
	}
	defer here.Close()
	there, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer there.Close()

	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "peer0", PeerNamespace: netlink.NsFd(int(ns)),
	}
	if err := here.LinkAdd(veth); err != nil {
		t.Fatalf("podtest: make eth0: %v", err)
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(veth); err != nil {
			t.Errorf("podtest: delete eth0: %v", err)
		}
	})
	for _, end := range []struct {
		handle *netlink.Handle
		link   string
		v4, v6 netip.Addr
	}{{here, "eth0", PodIPv4, PodIPv6}, {there, "peer0", OutsideIPv4, OutsideIPv6}, {handle: there, link: "lo"}} {
		if end.v4.IsValid() {
			if err := address(end.handle, end.link, end.v4, 24); err != nil {
				t.Fatal(err)
			}
			if err := address(end.handle, end.link, end.v6, 64); err != nil {
				t.Fatal(err)
			}
		}
		if err := up(*end.handle, end.link); err != nil {
			t.Fatal(err)
		}
	}
	return &Outside{ns: ns}
}

// Do runs f on a thread that is outside. Sockets that f opens itself (not in other goroutines) stay outside.
func (o *Outside) Do(f func()) {
	OnThread(func() {
		if err := netns.Set(o.ns); err != nil {
			panic(fmt.Sprintf("podtest: go outside: %v", err))
		}
		f()
	})
}

// Listen listens outside.
func (o *Outside) Listen(t testing.TB, address string) net.Listener {
	t.Helper()
	var l net.Listener
	var err error
	o.Do(func() { l, err = net.Listen("tcp", address) }) //nolint:noctx // a test's listener
	if err != nil {
		t.Fatalf("podtest: listen outside: %v", err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// OnThread runs f on a thread of its own that ends with it, so that f may change what belongs to threads: namespace, user,
// capabilities.
func OnThread(f func()) {
	done := make(chan any)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime then ends the thread
		defer func() { done <- recover() }()
		f()
	}()
	if p := <-done; p != nil {
		panic(p)
	}
}

// AsUser runs f with the effective user uid, and the group of the test. Only for tests that run as root of a machine.
func AsUser(uid int, f func()) { As(uid, os.Getegid(), f) }

// As runs f with the effective user uid and group gid. Only for tests that run as root of a machine, or for the only user that there is.
func As(uid, gid int, f func()) {
	OnThread(func() {
		keep := ^uintptr(0)
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESGID, keep, uintptr(gid), keep); errno != 0 {
			panic(fmt.Sprintf("podtest: become group %d: %v", gid, errno))
		}
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, keep, uintptr(uid), keep); errno != 0 {
			panic(fmt.Sprintf("podtest: become user %d: %v", uid, errno))
		}
		f()
	})
}

func newNamespace() (ns netns.NsHandle, err error) {
	OnThread(func() { ns, err = netns.New() })
	return ns, err
}

func up(h netlink.Handle, name string) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// address adds an address that may be used at once, without duplicate address detection.
func address(h *netlink.Handle, name string, a netip.Addr, bits int) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	ipnet := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}
	if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipnet, Flags: unix.IFA_F_NODAD}); err != nil {
		return fmt.Errorf("give %s the address %s: %w", name, a, err)
	}
	return nil
}
