package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	nflog "github.com/florianl/go-nflog/v2"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// TestNFLOGTaken: somebody else in the pod's network namespace listens to the group of the hold when an agent starts. That opens nothing: what is
// asked about waits. If the group is free again soon, the agent goes on; if not, it says so, ends, and leaves the pod closed.
func TestNFLOGTaken(t *testing.T) {
	s := startHonest(t)
	web := pod(t, s, "shop/web")
	rules := rulesetOf(t, web)
	inside, others := honestVerdicts(t, s)
	stop := besiegeOutside(t, web)
	taken := func() (release func()) {
		t.Helper()
		if err := s.KillAgent("shop/web"); err != nil {
			t.Fatal(err)
		}
		release = takeGroup(t, web)
		if err := s.StartAgent("shop/web"); err != nil {
			t.Fatal(err)
		}
		await(t, "word of the failure", func() bool {
			log := s.AgentLog("shop/web")
			return strings.Contains(log, "level=ERROR") && strings.Contains(log, "hold: failed; unknown destinations stay held") && strings.Contains(log, "NFLOG group 15001")
		})
		return release
	}
	good := func(when string) {
		t.Helper()
		if err := s.AwaitReady(t.Context(), "shop/web"); err != nil {
			t.Fatal(err)
		}
		for _, list := range []map[string]bool{inside, others} {
			for to, allowed := range list {
				connectSays(t, web, when, to, allowed)
			}
		}
		wantRuleset(t, web, rules)
	}

	release := taken()
	early := dialAll(t, web, inside)
	await(t, "connections to be held", func() bool { return early.waiting(t, web, 0) })
	release()
	good("given back at once")
	early.judge(t)

	release = taken()
	if err := s.AwaitReady(t.Context(), "shop/web"); err == nil || !strings.Contains(err.Error(), "the SYN hold failed 8 times in a row") {
		t.Errorf("an agent whose hold cannot work: %v", err)
	}
	late := dialAll(t, web, inside)
	await(t, "TCP to ask again", func() bool { return late.waiting(t, web, 1) })
	for to := range outsideOf(others) {
		connectSays(t, web, "after the agent's end", to, false)
	}
	release()
	if err := s.StartAgent("shop/web"); err != nil {
		t.Fatal(err)
	}
	good("given back later")
	late.judge(t)
	stop()
}

// takeGroup has this process listen to the hold's group in a pod, until it is released.
func takeGroup(t *testing.T, p *netns.Pod) (release func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var l *nflog.Nflog
	await(t, "the group", func() bool { // the library takes a packet that comes while it binds for an answer
		if err := p.Do(func() (err error) {
			l, err = nflog.Open(&nflog.Config{Group: hold.Defaults().Group, Copymode: nflog.CopyPacket})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		err := l.RegisterWithErrorFunc(ctx, func(nflog.Attribute) int { return 0 }, func(error) int { return 1 })
		if err != nil {
			l.Close()
		}
		return err == nil
	})
	return func() {
		cancel()
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestNFLOGOverrun: an app begins more connections than an agent that gets no time can read of, so that the kernel loses its messages. It admits nobody
// for that, and nobody who may connect is refused: TCP asks again.
func TestNFLOGOverrun(t *testing.T) {
	s := startHonest(t)
	web, db := pod(t, s, "shop/web"), pod(t, s, "shop/db")
	inside, _ := honestVerdicts(t, s)
	sc, err := s.Sidecar("shop/web")
	if err != nil {
		t.Fatal(err)
	}
	signal := func(sig syscall.Signal) {
		t.Helper()
		if err := syscall.Kill(sc.Agent, sig); err != nil {
			t.Fatal(err)
		}
	}
	signal(syscall.SIGSTOP)
	defer signal(syscall.SIGCONT)
	await(t, "each of its threads to stop", func() bool { return stopped(t, sc.Agent) })
	lost := func() int {
		_, n, there := logSocket(t, web)
		if !there {
			t.Fatal("nobody listens")
		}
		return n
	}
	// Not as many at a time as the kernel refuses, of each family, because they are more than hold.Config.Rate; TCP sends them again.
	closeAll := flood(t, web, db.Spec().IPs, int(hold.Defaults().Rate)*3/4)
	await(t, "the first loss", func() bool { return lost() > 0 })
	closeAll()
	before := lost()
	d := dialAll(t, web, inside)
	await(t, "the loss of each of their SYNs", func() bool { return d.waiting(t, web, 0) && lost() >= before+len(inside) })
	signal(syscall.SIGCONT)
	for _, o := range d.wait() {
		if d.to[o.Target.Addr] != (o.Reached != "") || !d.to[o.Target.Addr] && o.Connect != netns.Refused {
			t.Errorf("%s, allowed %t: connect() says %q after %s; answered by %q (%s)", o.Target.Addr, d.to[o.Target.Addr], o.Connect, o.Elapsed, o.Reached, o.Err)
		}
	}
	await(t, "word of the loss", func() bool { return strings.Contains(s.AgentLog("shop/web"), "too many new connections at once") })
	for to, allowed := range inside {
		connectSays(t, web, "afterwards", to, allowed)
	}
	if n := accepted(t, db, echo); n != 0 {
		t.Errorf("db has accepted %d connections", n)
	}
}

// stopped reports whether a process, which must be there, is stopped altogether.
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/[0-9]*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("process %d: %v, threads %v", pid, err, files)
	}
	for _, f := range files {
		if text, err := os.ReadFile(f); err != nil || !strings.Contains(string(text), "State:\tT") {
			return false
		}
	}
	return true
}

// flood begins so many connections from a pod to one port of each of some addresses, and waits for none.
func flood(t *testing.T, from *netns.Pod, to []netip.Addr, n int) (closeAll func()) {
	t.Helper()
	var sockets []int
	closeAll = func() {
		for _, fd := range sockets {
			_ = unix.Close(fd)
		}
		sockets = nil
	}
	t.Cleanup(closeAll)
	if err := from.Do(func() error {
		for i := range n * len(to) {
			a := to[i%len(to)]
			family, address := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: 20000, Addr: a.As16()})
			if a.Is4() {
				family, address = unix.AF_INET, &unix.SockaddrInet4{Port: 20000, Addr: a.As4()}
			}
			fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			sockets = append(sockets, fd)
			if err := unix.Connect(fd, address); !errors.Is(err, unix.EINPROGRESS) {
				return fmt.Errorf("connection %d, to %s: %w", i, a, err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return closeAll
}
