package envoy

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Privilege says as whom Envoy runs and so how the redirect tells its connections.
type Privilege string

const (
	// OwnUser is one of [Users] without capabilities. It takes an agent that is root and a kernel that gives the pod that user.
	OwnUser Privilege = "uid"
	// SharedUser is the agent's own user, with the capability to mark connections.
	SharedUser Privilege = "mark"
	// AgentUser is the agent's own user, one of proxyuser.Pod, both without capabilities: the redirect exempts that user.
	AgentUser Privilege = "agent"
)

// check fails where the kernel or the agent's user does not allow the privilege.
func (p Privilege) check(user proxyuser.User) error {
	switch p {
	case SharedUser:
		return nil
	case AgentUser:
		if !proxyuser.Pod.Has(user) {
			return fmt.Errorf("the agent is %s, whose connections nothing exempts from the redirect; run it as one of %s, with a group of these", user, proxyuser.Pod)
		}
		return nil
	case OwnUser:
	default:
		return fmt.Errorf("envoy privilege %q: not %s, %s or %s", string(p), OwnUser, SharedUser, AgentUser)
	}
	if os.Geteuid() != 0 {
		return errors.New("envoy is to run as a user of its own, which takes an agent that runs as root; run it so, or use --exempt mark")
	}
	users, err := Users()
	if err == nil && !users.Has(user) {
		err = fmt.Errorf("envoy is to run as %s: not of %s", user, users)
	}
	return err
}

// Users are those of which one may be Envoy's, for OwnUser: the first range that this process's user namespace has, users and groups.
func Users() (proxyuser.Range, error) {
	users, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return proxyuser.Range{}, fmt.Errorf("envoy privilege: %w", err)
	}
	groups, err := os.ReadFile("/proc/self/gid_map")
	if err != nil {
		return proxyuser.Range{}, fmt.Errorf("envoy privilege: %w", err)
	}
	for _, r := range []proxyuser.Range{proxyuser.Pod, proxyuser.Mapped} {
		if mapped(string(users), r) && mapped(string(groups), r) {
			return r, nil
		}
	}
	return proxyuser.Range{}, fmt.Errorf("envoy is to run as a user of its own, and this user namespace maps neither %s nor %s; use --exempt mark",
		proxyuser.Pod, proxyuser.Mapped)
}

// mapped reports whether a user namespace has all of a range. It reads the form of /proc/PID/uid_map and gid_map (user_namespaces(7)): lines of first
// number inside, first outside, length.
func mapped(idMap string, r proxyuser.Range) bool {
	from, count := uint64(r.First), uint64(r.Count)
	for line := range strings.Lines(idMap) {
		var first, outside, length uint64
		if _, err := fmt.Sscan(line, &first, &outside, &length); err == nil && first <= from && from+count <= first+length {
			return true
		}
	}
	return false
}

// prepare gives up, for the calling thread, what Envoy is not to have, and returns how to start it from there. The thread must be
// locked and must not run anything else afterwards.
func (p Privilege) prepare(user proxyuser.User) (*syscall.SysProcAttr, error) {
	attr := &syscall.SysProcAttr{
		Pdeathsig: syscall.SIGKILL,
		Setpgid:   true, // Ctrl-C in a terminal is the agent's to handle
	}
	var keep []uintptr
	switch p {
	case OwnUser:
		attr.Credential = &syscall.Credential{Uid: user.UID, Gid: user.GID}
	case SharedUser:
		c, err := markingCapability()
		if err != nil {
			return nil, err
		}
		keep = []uintptr{c}
		attr.AmbientCaps = keep
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("set no_new_privs: %w", err)
	}
	// Another user has no capabilities after exec whatever the bounding set says, nor has one who has none now; for the same user the set is
	// what limits it.
	if err := limitCapabilities(keep); err != nil && p == SharedUser {
		return nil, fmt.Errorf("limit envoy's capabilities (needs CAP_SETPCAP): %w", err)
	}
	return attr, nil
}

// limitCapabilities takes all capabilities but those to keep out of the thread's bounding set.
func limitCapabilities(keep []uintptr) error {
	for c := uintptr(0); ; c++ {
		if slices.Contains(keep, c) {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // past the last capability that the kernel knows
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// markingCapability finds the weakest capability with which this kernel lets a socket be marked, by trying on a thread of its own.
func markingCapability() (uintptr, error) {
	for _, c := range []uintptr{unix.CAP_NET_RAW, unix.CAP_NET_ADMIN} {
		result := make(chan error)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			result <- markWith(c)
		}()
		if err := <-result; err == nil {
			return c, nil
		}
	}
	return 0, errors.New("envoy cannot mark its connections: the agent needs CAP_NET_RAW (Linux 5.17) or CAP_NET_ADMIN")
}

// markWith tries to mark a socket with no more than one capability in effect for the thread.
func markWith(c uintptr) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return err
	}
	caps[0].Effective, caps[1].Effective = 1<<c, 0 // both candidates are below 32
	if err := unix.Capset(&header, &caps[0]); err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, names.ProxyMark)
}
