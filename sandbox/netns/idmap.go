package netns

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Where the ranges of ids are written down that an ordinary user may map. Tests put their own here.
var subUIDFile, subGIDFile = "/etc/subuid", "/etc/subgid"

// wholeRange is how many ids a range must hold for a mapping to count as full: what useradd gives, and what reaches "nobody".
const wholeRange = 65536

// mapping is one way to have root's rights over the enclosure's namespaces.
type mapping interface {
	prepare(*syscall.SysProcAttr) // before init starts
	apply(pid int) error          // init has started and waits
}

// mappings returns the ways that are open to this process, the best first; a later one is for when an earlier one fails.
func mappings() []mapping {
	if hasCapability(unix.CAP_SYS_ADMIN) {
		return []mapping{rootMapping{}}
	}
	single := singleMapping{uid: os.Getuid(), gid: os.Getgid()}
	if full, ok := newRangeMapping(os.Getuid(), os.Getgid()); ok {
		return []mapping{full, single}
	}
	return []mapping{single}
}

func hasCapability(c uint) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[c/32].Effective&(1<<(c%32)) != 0
}

// rootMapping needs no user namespace.
type rootMapping struct{}

func (rootMapping) prepare(*syscall.SysProcAttr) {}
func (rootMapping) apply(int) error              { return nil }

// singleMapping maps the user to root and nobody else, which the kernel lets everybody do.
type singleMapping struct{ uid, gid int }

func (m singleMapping) prepare(a *syscall.SysProcAttr) {
	a.Cloneflags |= unix.CLONE_NEWUSER
	a.UidMappings = []syscall.SysProcIDMap{{HostID: m.uid, Size: 1}}
	a.GidMappings = []syscall.SysProcIDMap{{HostID: m.gid, Size: 1}}
}
func (singleMapping) apply(int) error { return nil }

// rangeMapping maps the user to root and the user's subordinate ids to 1 and up, with the set-uid programs that check the range.
type rangeMapping struct {
	newUIDMap, newGIDMap string
	uid, gid             int
	uids, gids           idRange
}

type idRange struct{ start, count int }

func newRangeMapping(uid, gid int) (rangeMapping, bool) {
	m := rangeMapping{uid: uid, gid: gid}
	var err error
	if m.newUIDMap, err = exec.LookPath("newuidmap"); err != nil {
		return m, false
	}
	if m.newGIDMap, err = exec.LookPath("newgidmap"); err != nil {
		return m, false
	}
	var okUID, okGID bool
	m.uids, okUID = subordinate(subUIDFile, uid)
	m.gids, okGID = subordinate(subGIDFile, uid) // both files go by the user, see subgid(5)
	return m, okUID && okGID
}

// subordinate reads the first whole range of a user from lines "name or uid:start:count", see subuid(5).
func subordinate(file string, uid int) (idRange, bool) {
	f, err := os.Open(file)
	if err != nil {
		return idRange{}, false
	}
	defer func() { _ = f.Close() }()
	name := ""
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		name = u.Username
	}
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Split(strings.TrimSpace(lines.Text()), ":")
		if len(fields) != 3 || fields[0] == "" || fields[0] != name && fields[0] != strconv.Itoa(uid) {
			continue
		}
		start, err1 := strconv.Atoi(fields[1])
		count, err2 := strconv.Atoi(fields[2])
		if err1 == nil && err2 == nil && start > 0 && count >= wholeRange {
			return idRange{start, count}, true
		}
	}
	return idRange{}, false
}

func (m rangeMapping) prepare(a *syscall.SysProcAttr) {
	a.Cloneflags |= unix.CLONE_NEWUSER
	// init starts before its ids are mapped, as nobody in particular, and would lose its capabilities to exec but for these.
	for c := uintptr(0); c <= lastCapability(); c++ {
		a.AmbientCaps = append(a.AmbientCaps, c)
	}
}

func (m rangeMapping) apply(pid int) error {
	for _, step := range []struct {
		program string
		id      int
		r       idRange
	}{{m.newGIDMap, m.gid, m.gids}, {m.newUIDMap, m.uid, m.uids}} {
		args := []int{pid, 0, step.id, 1, 1, step.r.start, step.r.count}
		text := make([]string, len(args))
		for i, a := range args {
			text[i] = strconv.Itoa(a)
		}
		if out, err := exec.CommandContext(context.Background(), step.program, text...).CombinedOutput(); err != nil {
			return fmt.Errorf("map ids with %s: %w: %s", step.program, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// lastCapability is the highest capability number that the kernel knows.
func lastCapability() uintptr {
	text, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			return uintptr(n)
		}
	}
	return unix.CAP_LAST_CAP
}
