package netns_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// The tests of entering start this test binary as a command of its own, as a user would start mantlet. What it then does inside is one of
// these roles.
const (
	roleVariable   = "MANTLET_TEST_ROLE"
	subIDsVariable = "MANTLET_TEST_SUBIDS"
)

var roles = map[string]func() int{
	"facts":   tellFacts,
	"signals": countSignals,
	"orphans": makeOrphans,
	"network": useNetwork,
	"hang":    hang,
	"die":     func() int { _ = syscall.Kill(os.Getpid(), syscall.SIGKILL); select {} },
	"exit":    func() int { return 3 },
	"orphan":  beOrphan,
}

// playRole does not return if this process is not for running tests.
func playRole() {
	switch filepath.Base(os.Args[0]) {
	case "newuidmap":
		os.Exit(mapIDs("uid_map"))
	case "newgidmap":
		os.Exit(mapIDs("gid_map"))
	}
	role := roles[os.Getenv(roleVariable)]
	if role == nil {
		return
	}
	netns.Dispatch()
	if file := os.Getenv(subIDsVariable); file != "" {
		netns.SetSubordinateFiles(file, file)
	}
	if netns.Inside() || os.Getenv(roleVariable) == "exit" || os.Getenv(roleVariable) == "orphan" {
		os.Exit(role())
	}
	code, err := netns.Reenter(os.Args)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(99)
	}
	os.Exit(code)
}

// mapIDs does what the set-uid programs newuidmap and newgidmap do, without asking whether it may.
func mapIDs(file string) int {
	var text strings.Builder
	for i, a := range os.Args[2:] {
		text.WriteString(a + []string{" ", " ", "\n"}[i%3])
	}
	if err := os.WriteFile(filepath.Join("/proc", os.Args[1], file), []byte(text.String()), 0); err != nil {
		fmt.Fprintln(os.Stdout, err)
		return 1
	}
	return 0
}

// facts are what the inner command sees of its place.
type facts struct {
	Enclosure      netns.Enclosure
	PID, PPID, UID int
	Args           []string
	Stdin, Dir     string
	Env            string
	Links          []string
	Processes      int
	Files          uint64
}

func tellFacts() int {
	var f facts
	var err error
	if f.Enclosure, err = netns.Enclosed(); err != nil {
		return complain(err)
	}
	f.PID, f.PPID, f.UID, f.Args, f.Env = os.Getpid(), os.Getppid(), os.Getuid(), os.Args, os.Getenv("MANTLET_TEST_FACT")
	in, _ := io.ReadAll(os.Stdin)
	f.Stdin = string(in)
	f.Dir, _ = os.Getwd()
	links, err := net.Interfaces()
	if err != nil {
		return complain(err)
	}
	for _, l := range links {
		f.Links = append(f.Links, l.Name)
	}
	f.Processes = len(processes())
	if err := os.WriteFile(filepath.Join(f.Enclosure.RunDir, "file"), nil, 0o600); err != nil {
		return complain(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(f); err != nil {
		return complain(err)
	}
	fmt.Fprintln(os.Stderr, "a word to stderr")
	return 7
}

func complain(err error) int {
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// countSignals tells each interrupt, and with SIGTERM how many of each kind there were.
func countSignals() int {
	arrived := make(chan os.Signal, 16)
	signal.Notify(arrived, syscall.SIGINT, syscall.SIGHUP, syscall.SIGTERM)
	fmt.Fprintln(os.Stdout, "ready", os.Getpid())
	interrupts, hangups := 0, 0
	for s := range arrived {
		switch s {
		case syscall.SIGINT:
			interrupts++
			fmt.Fprintln(os.Stdout, "interrupt")
		case syscall.SIGHUP:
			hangups++
			fmt.Fprintln(os.Stdout, "hangup")
		case syscall.SIGTERM:
			fmt.Fprintln(os.Stdout, "interrupts", interrupts, "hangups", hangups)
			return 0
		}
	}
	return 1
}

// makeOrphans starts children whose exit codes it needs and, between them, orphans for PID 1.
func makeOrphans() int {
	for range 10 {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), roleVariable+"=orphan")
		out, err := cmd.Output()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 5 {
			return complain(fmt.Errorf("a child ended with %w, not with 5", err))
		}
		orphan, err := strconv.Atoi(strings.TrimSpace(string(out)))
		if err != nil {
			return complain(err)
		}
		if fd, err := unix.PidfdOpen(orphan, 0); err == nil {
			awaitEnd(fd)
			unix.Close(fd)
		}
		awaitReaped([]int{orphan}) // that PID 1 never does it shows as the test's own timeout
	}
	return 0
}

// beOrphan leaves a child behind that ends a moment later.
func beOrphan() int {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleVariable+"=exit")
	if err := cmd.Start(); err != nil {
		return complain(err)
	}
	fmt.Fprintln(os.Stdout, cmd.Process.Pid)
	return 5
}

// useNetwork has two pods talk by addresses and by Services.
func useNetwork() int {
	n, pods, err := smallNetwork()
	if err != nil {
		return complain(err)
	}
	ctx, cancel := testContext()
	defer cancel()
	vips := []netip.AddrPort{netip.MustParseAddrPort("10.96.0.1:80"), netip.MustParseAddrPort("[fd00:10:96::1]:80")}
	var services []netns.Service
	var targets []netns.Target
	for i, vip := range vips {
		to := netip.AddrPortFrom(pods[1].Spec().IPs[i], 80)
		services = append(services, netns.Service{Addr: vip, Protocol: netns.TCP, Backends: []netip.AddrPort{to}})
		targets = append(targets, netns.Target{Addr: vip, Speaks: netns.ClientFirst, Nonce: "x"}, netns.Target{Addr: to, Speaks: netns.ClientFirst, Nonce: "x"})
	}
	// So many that one transaction of an ordinary user cannot hold them.
	for i := range 5000 {
		services = append(services, netns.Service{Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 97, byte(i >> 8), byte(i)}), 1), Protocol: netns.TCP, Backends: services[0].Backends})
	}
	if err := n.SetServices(services); err != nil {
		return complain(err)
	}
	out, err := pods[0].Probe(ctx, targets)
	if err != nil {
		return complain(err)
	}
	for _, o := range out {
		if o.Reached != "test/pod-1:80" || o.Err != "" {
			return complain(fmt.Errorf("%+v", o))
		}
	}
	for user, want := range map[netns.User]string{netns.App: "0000000000000000", netns.Root: ""} {
		got, err := capabilities(pods[0], user)
		if err != nil {
			return complain(err)
		}
		if want != "" && got != want || want == "" && strings.Trim(got, "0") == "" {
			return complain(fmt.Errorf("as %+v: capabilities %s", user, got))
		}
	}
	if err := n.Close(); err != nil {
		return complain(err)
	}
	fmt.Fprintln(os.Stdout, "all well")
	return 0
}

// hang keeps a network with processes in it and never ends by itself.
func hang() int {
	if _, _, err := smallNetwork(); err != nil {
		return complain(err)
	}
	fmt.Fprintln(os.Stdout, "ready", os.Getpid())
	_, _ = bufio.NewReader(os.Stdin).ReadByte() // nobody writes
	select {}
}
