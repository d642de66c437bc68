package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/xds/names"
)

// anotherUser: an app's user gets at nothing of the sidecar's, and there is nothing to get at on disk or on the network.
func anotherUser(t *testing.T, s *sandbox.Sandbox) {
	db, sc := pod(t, s, "shop/db"), sidecarOf(t, "shop/db")
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", sc.envoy))
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Do(func() error {
		if own, err := os.Readlink("/proc/thread-self/ns/net"); err != nil || own != ns {
			t.Errorf("Envoy is in %s, the pod is %s (%v)", ns, own, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}

	t.Run("no key on disk", func(t *testing.T) {
		root := filepath.Dir(filepath.Dir(sc.runDir)) // of all pods
		n := 0
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			text, err := os.ReadFile(path)
			if bytes.Contains(text, []byte("PRIVATE KEY")) {
				t.Errorf("%s holds a key", path)
			}
			n++
			return err
		})
		if err != nil || n < 5 {
			t.Errorf("looked at %d files: %v", n, err)
		}
	})

	t.Run("nothing else listens", func(t *testing.T) {
		if err := db.Do(func() error {
			got, err := listening()
			if want := []int{int(banner), int(echo), names.OutboundPort, names.InboundPort}; !slices.Equal(got, want) {
				t.Errorf("ports %v, want %v", got, want)
			}
			text, err2 := os.ReadFile("/proc/thread-self/net/unix")
			for line := range strings.Lines(string(text)) { // abstract sockets belong to the network namespace, and have no permissions
				if strings.Contains(line, "@") {
					t.Errorf("an abstract socket: %s", line)
				}
			}
			return errors.Join(err, err2)
		}); err != nil {
			t.Error(err)
		}
	})

	if e, err := netns.Enclosed(); err != nil || e.SingleUID {
		t.Skipf("there is no other user to be here: run as root for this part (%v)", err)
	}
	shut := map[string]func(string) error{
		sc.token: read,
		fmt.Sprintf("/proc/%d/environ", sc.agent):       read,
		fmt.Sprintf("/proc/%d/environ", sc.envoy):       read,
		fmt.Sprintf("/proc/%d/mem", sc.agent):           read,
		fmt.Sprintf("/proc/%d/mem", sc.envoy):           read,
		fmt.Sprintf("/proc/%d/fd", sc.agent):            list,
		fmt.Sprintf("/proc/%d/fd", sc.envoy):            list,
		sc.runDir:                                       list,
		filepath.Join(sc.runDir, "envoy"):               list,
		filepath.Join(sc.runDir, "agent.sock"):          call,
		filepath.Join(sc.runDir, "status.sock"):         call,
		filepath.Join(sc.runDir, "envoy", "admin.sock"): call,
	}
	for path, use := range shut {
		if err := use(path); err != nil && !strings.HasSuffix(path, "/mem") { // root can: it is there
			t.Errorf("root at %s: %v", path, err)
		}
		if err := asApp(db, func() error { return use(path) }); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("an app's user at %s: %v", path, err)
		}
	}
	// Nor can it mark its connections as the proxy's, or take the proxy's place on the capture port.
	if err := asApp(db, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, names.ProxyMark)
	}); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("an app marks its socket: %v", err)
	}
	for _, port := range []int{names.InboundPort, names.OutboundPort} {
		for _, host := range []string{"0.0.0.0", "[::]", "127.0.0.1", "[::1]", db.Spec().IPs[0].String()} {
			if err := asApp(db, func() error {
				config := net.ListenConfig{Control: reusePort}
				l, err := config.Listen(t.Context(), "tcp", fmt.Sprintf("%s:%d", host, port))
				if err == nil {
					l.Close()
				}
				return err
			}); !errors.Is(err, syscall.EADDRINUSE) {
				t.Errorf("an app listens on %s:%d: %v", host, port, err)
			}
		}
	}
}

func read(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Read(make([]byte, 1))
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func list(path string) error {
	_, err := os.ReadDir(path)
	return err
}

func call(path string) error {
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	return err
}

func reusePort(_, _ string, raw syscall.RawConn) error {
	var failed error
	err := raw.Control(func(fd uintptr) {
		failed = errors.Join(unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
	})
	return errors.Join(err, failed)
}

// asApp runs f as the user of apps, in a pod. The thread that becomes that user ends with it.
func asApp(p *netns.Pod, f func() error) error {
	return p.Do(func() error {
		for _, set := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} { // of this thread alone
			if _, _, errno := syscall.RawSyscall(set, uintptr(netns.App.UID), uintptr(netns.App.UID), uintptr(netns.App.UID)); errno != 0 {
				return errno
			}
		}
		return f()
	})
}

// listening lists the ports that TCP sockets of the thread's network namespace listen on.
func listening() ([]int, error) {
	var ports []int
	for _, file := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(text)) {
			f := strings.Fields(line)
			if len(f) < 4 || f[3] != "0A" {
				continue
			}
			_, hex, _ := strings.Cut(f[1], ":")
			port, err := strconv.ParseUint(hex, 16, 16)
			if err != nil {
				return nil, err
			}
			ports = append(ports, int(port))
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports), nil
}

// addAddresses gives the thread's network namespace more addresses, usable at once.
func addAddresses(addrs []netip.Addr) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, a := range addrs {
		ip := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		if err := netlink.AddrReplace(lo, &netlink.Addr{IPNet: ip, Flags: unix.IFA_F_NODAD}); err != nil {
			return err
		}
	}
	return nil
}
