package netns

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What this executable is started as a second time. The role is argv[0], which nobody types by accident; each role checks besides that
// it stands where only this package puts it.
const (
	roleInit  = "mantlet:init"
	roleInner = "mantlet:sandbox"
	roleApp   = "mantlet:app"
	roleExec  = "mantlet:exec"
)

// firstFile is the first file descriptor that is passed on beside the standard ones.
const firstFile = 3

var (
	dispatched bool
	inside     bool
	inherited  []*os.File
)

// Dispatch must be the first call of main in every executable that uses this package. If the process is one that this package started,
// Dispatch does that process's work and does not return, or, for the inner command, takes the role off os.Args and returns.
// For everybody else it does nothing.
func Dispatch() {
	dispatched = true
	switch os.Args[0] {
	case roleInit:
		os.Exit(initMain())
	case roleApp:
		os.Exit(appMain())
	case roleExec:
		os.Exit(execMain())
	case roleInner:
		files := -1
		if len(os.Args) >= 3 {
			files, _ = strconv.Atoi(os.Args[1])
		}
		if !belowInit() || files < 0 {
			fmt.Fprintf(os.Stderr, "%s is started by mantlet itself, inside its own namespaces\n", roleInner)
			os.Exit(2)
		}
		inside = true
		os.Args = os.Args[2:]
		for i := range files {
			unix.CloseOnExec(firstFile + i)
			inherited = append(inherited, os.NewFile(uintptr(firstFile+i), "inherited"))
		}
	}
}

// Inherited returns the files that were given to Reenter.
func Inherited() []*os.File { return inherited }

// Inside reports whether this process runs in the enclosure that Reenter made.
func Inside() bool { return inside }

// belowInit reports whether PID 1, as this process's /proc shows it, is the enclosure's init and the parent of this process. Taking
// some other network namespace for the node would change the machine's own network.
func belowInit() bool {
	if os.Getppid() != 1 {
		return false
	}
	cmdline, err := os.ReadFile("/proc/1/cmdline")
	first, _, _ := bytes.Cut(cmdline, []byte{0})
	return err == nil && string(first) == roleInit
}

// Enclosure says what the enclosure of this process allows.
type Enclosure struct {
	// UserNamespace is true when the command was not started with the rights of root.
	UserNamespace bool
	// SingleUID is true when only one user id is mapped: every process runs as uid 0 of the enclosure, some without capabilities.
	// Rules that tell processes apart by uid (the redirect's exemption of Envoy) must go by mark then.
	SingleUID bool
	// RunDir is an empty directory on a tmpfs that only this enclosure sees and that goes away with it. What the machine has in the
	// directory above (/dev/shm, else /run) is hidden from the enclosure.
	RunDir string
}

// Enclosed describes the enclosure. It fails outside of one.
func Enclosed() (Enclosure, error) {
	if !inside {
		return Enclosure{}, fmt.Errorf("not inside the sandbox's namespaces: call netns.Reenter first")
	}
	e := Enclosure{RunDir: runDir()}
	uidMap, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return Enclosure{}, fmt.Errorf("read which user ids are mapped: %w", err)
	}
	e.UserNamespace, e.SingleUID = readUIDMap(string(uidMap))
	return e, nil
}

// readUIDMap reads the lines "inside outside count" of a uid_map. Without a user namespace it maps all 2^32-1 ids to themselves.
func readUIDMap(text string) (mapped, single bool) {
	total := uint64(0)
	identity := false
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		var in, out, count uint64
		if _, err := fmt.Sscan(line, &in, &out, &count); err != nil {
			continue
		}
		total += count
		identity = in == out && count == 1<<32-1
	}
	return !identity, total <= 1
}
