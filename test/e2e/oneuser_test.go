package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/sandbox/netns"
)

const (
	ordinaryUID = 23456                 // has nothing but its own number
	asOneUser   = "MANTLET_E2E_ONEUSER" // in the environment: this is that user
)

// TestHoldOfOneUser: where one user is all there is, app, agent and Envoy are the same one, and only the mark of Envoy's connections, and the agent's, keeps
// them out of the hold. It tells the truth there too, and an agent that dies opens nothing.
func TestHoldOfOneUser(t *testing.T) {
	e, err := netns.Enclosed()
	if err != nil {
		t.Fatal(err)
	}
	if !e.SingleUID {
		asOrdinaryUser(t, "TestHoldOfOneUser")
		return
	}
	s := startHonest(t)
	web := pod(t, s, "shop/web")
	sc, err := s.Sidecar("shop/web")
	if err != nil {
		t.Fatal(err)
	}
	const netRaw = "0000000000002000" // the weakest capability with which a socket can be marked
	for _, p := range []struct {
		what         string
		pid          int
		capabilities string
	}{{"agent", sc.Agent, ""}, {"Envoy", sc.Envoy, netRaw}, {"app", appOf(t, "shop/web"), strings.Repeat("0", 16)}} {
		if got := statusOf(t, p.pid, "Uid"); strings.Join(strings.Fields(got), " ") != "0 0 0 0" {
			t.Errorf("%s: runs as %s: there is another user", p.what, got)
		}
		if got := statusOf(t, p.pid, "CapEff"); p.capabilities != "" && got != p.capabilities {
			t.Errorf("%s: has the capabilities %s, not %s", p.what, got, p.capabilities)
		}
	}
	if err := web.Do(func() error {
		if u, err := netfilter.Exempted(); err != nil || u != nil {
			t.Errorf("the redirect exempts %v by user (%v)", u, err)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	inside, others := honestVerdicts(t, s)
	for round := range 2 {
		for _, list := range []map[string]bool{inside, others} {
			for to, allowed := range list {
				connectSays(t, web, fmt.Sprintf("attempt %d", round+1), to, allowed)
			}
		}
	}
	dieHolding(t, s, true)
}

// asOrdinaryUser runs a test once more, as a user who gets an enclosure with one user.
func asOrdinaryUser(t *testing.T, test string) {
	t.Helper()
	if os.Getenv(asOneUser) != "" {
		t.Fatal("an ordinary user's enclosure has more than one user")
	}
	b := binaries(t)
	dir := podtest.Dir(t) // where that user may go
	reachable := map[string]string{builtAgent: b.Agent, "MANTLET_ENVOY": b.Envoy}
	env := append(os.Environ(), asOneUser+"=1", "PATH=/nonexistent", "GORACE=atexit_sleep_ms=0") // no newuidmap, which could give it more users
	for variable, program := range reachable {
		at := filepath.Join(dir, filepath.Base(program))
		if err := os.WriteFile(at, nil, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(program, at, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		env = append(env, variable+"="+at)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^"+test+"$", "-test.v", "-test.count=1")
	cmd.Dir, cmd.Env = "/", env
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: ordinaryUID, Gid: ordinaryUID}}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+test)) {
		t.Errorf("as an ordinary user: %v\n%s", err, out)
	}
}

// appOf is the process that stands for the containers of a pod.
func appOf(t *testing.T, name string) int {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil || string(text) != "mantlet:app\x00"+name+"\x00" {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(f, "/proc/%d/", &pid); err != nil {
			t.Fatal(err)
		}
		return pid
	}
	t.Fatalf("no app of %s runs", name)
	return 0
}

// statusOf is a line of /proc/PID/status.
func statusOf(t *testing.T, pid int, key string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("process %d has no %s", pid, key)
	return ""
}
