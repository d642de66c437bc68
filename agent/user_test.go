package agent

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// exempted is whom the pod's redirect exempts.
func exempted(t *testing.T) proxyuser.User {
	t.Helper()
	u, err := netfilter.Exempted()
	if err != nil || u == nil {
		t.Fatalf("whom the redirect exempts: %v, %v", u, err)
	}
	return *u
}

// others are users that an image can name, or a file in it can be of, where u is the sidecar's; what they share with it does not help them.
func others(u proxyuser.User) []proxyuser.User {
	list := []proxyuser.User{{UID: 15150, GID: 15150}, {UID: u.UID, GID: 0}, {UID: u.UID, GID: u.UID}, {UID: 0, GID: u.GID}, {UID: u.GID, GID: u.GID}}
	for range 3 {
		list = append(list, proxyuser.Pod.User(randomSeed()))
	}
	return list
}

// onlyExempt wants that nobody but the sidecar's user gets past the sidecar, to what the pod's egress policy denies.
func onlyExempt(t *testing.T, when, denied string, u proxyuser.User) {
	t.Helper()
	for _, other := range others(u) {
		podtest.As(int(other.UID), int(other.GID), func() {
			if _, err := dial(t, denied); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: an app that runs as %s, where the sidecar is %s: %v, not refused", when, other, u, err)
			}
			if leaves(t, "10.99.0.1:53") {
				t.Errorf("%s: UDP of %s leaves", when, other)
			}
		})
	}
	podtest.As(int(u.UID), int(u.GID), func() { // so that what was refused was so for its user
		if _, err := dial(t, denied); err != nil {
			t.Errorf("%s: the sidecar's user: %v", when, err)
		}
	})
}

// credentials are those of a process, if it has one user and one group for all purposes.
func credentials(t *testing.T, pid int) (u proxyuser.User) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		for key, into := range map[string]*uint32{"Uid:": &u.UID, "Gid:": &u.GID} {
			f := strings.Fields(line)
			if f[0] != key {
				continue
			}
			if _, err := fmt.Sscan(f[1], into); err != nil || strings.Join(f[1:], " ") != strings.TrimSuffix(strings.Repeat(f[1]+" ", 4), " ") {
				t.Fatalf("%s (%v)", line, err)
			}
		}
	}
	return u
}

// Nobody knows before a pod starts whom its redirect will exempt, and it exempts nobody else. The next agent in the pod goes on with the same user, unless the
// kernel has forgotten; then the former one is nobody.
func TestOnlyEnvoyPasses(t *testing.T) {
	if podtest.SingleUser() {
		t.Skip("this user namespace maps one user only, so that nobody else can be anybody: run the tests as root")
	}
	w := newWorld(t)
	const denied = "10.99.0.1:9091"
	w.app("[::]:8080")
	echo(t, w.outside.Listen(t, "[::]:9090"))
	echo(t, w.outside.Listen(t, "[::]:9091"))
	w.startPlane()
	enforced := func(when string) proxyuser.User {
		before, _ := w.log.read()
		w.finished = false
		w.startAgent()
		w.log.await(t, "start of envoy", func(s string) bool { return strings.Contains(s[len(before):], "envoy: started") })
		w.ready()
		u := exempted(t)
		if !proxyuser.Pod.Has(u) {
			t.Errorf("%s: %s is exempt, not of %s", when, u, proxyuser.Pod)
		}
		if got := credentials(t, w.envoyPID()); got != u {
			t.Errorf("%s: Envoy is %s, and %s is exempt", when, got, u)
		}
		onlyExempt(t, when, denied, u)
		c, err := dial(t, "10.99.0.1:9090")
		if err != nil {
			t.Fatalf("%s: what is admitted: %v", when, err)
		}
		if got := greeted(t, c); got != "hello\n" {
			t.Errorf("%s: what is admitted: %q", when, got)
		}
		c.Close()
		w.stopAgent()
		return u
	}
	first := enforced("at first")
	if second := enforced("after a restart"); second != first {
		t.Errorf("after a restart Envoy is %s, before it was %s", second, first)
	}
	r, err := netfilter.New(netfilter.ByMark(), w.cfg.Logger)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.Remove(); err != nil { // and the SYN hold, which exempts the former user, stays
		t.Fatal(err)
	}
	third := enforced("after the table was lost")
	if third == first {
		t.Fatal("drawn twice the same")
	}
	podtest.As(int(first.UID), int(first.GID), func() {
		if _, err := dial(t, denied); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("the former user: %v, not refused", err)
		}
	})
}
