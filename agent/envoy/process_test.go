package envoy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/mantlet/mantlet/agent/podtest"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// runAgent makes the test binary behave as an agent that runs Envoy and nothing else; the value is Envoy's folder.
const runAgent = "MANTLET_TEST_AGENT"

func TestMain(m *testing.M) {
	if dir := os.Getenv(runAgent); dir != "" {
		os.Exit(onlyEnvoy(dir))
	}
	os.Exit(podtest.Main(m))
}

func onlyEnvoy(dir string) int {
	p, err := New(Config{
		Path: os.Getenv("MANTLET_ENVOY"), Dir: dir, Pod: "shop/web-0", AgentSocket: filepath.Join(dir, "none.sock"), Concurrency: 1,
		Privilege: SharedUser, Output: io.Discard, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Started: func(pid int) { fmt.Fprintln(os.Stdout, pid) }, Exited: func() {},
	})
	if err == nil {
		err = p.Run(context.Background())
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// buffer is a log that can be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// supervised is a Process that runs.
type supervised struct {
	*Process
	pids   chan int
	log    *buffer
	output *buffer
}

// supervise runs Envoy until the test ends.
func supervise(t *testing.T, as Privilege) *supervised {
	t.Helper()
	t.Cleanup(func() { goleak.VerifyNone(t) })
	s := &supervised{pids: make(chan int, 16), log: &buffer{}, output: &buffer{}}
	dir := podtest.Dir(t)
	var err error
	s.Process, err = New(Config{
		Path: podtest.Envoy(t), Dir: filepath.Join(dir, "envoy"), Pod: "shop/web-0", AgentSocket: filepath.Join(dir, "none.sock"),
		Privilege: as, User: proxyuser.Pod.User(proxyuser.Seed{7: 1, 15: 2}), Concurrency: 1, DrainTimeout: time.Minute, Output: s.output, Logger: slog.New(slog.NewTextHandler(s.log, nil)),
		Started: func(pid int) { s.pids <- pid }, Exited: func() {},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("log:\n%s\nenvoy:\n%s", s.log, s.output)
		}
	})
	return s
}

// live waits until Envoy's admin interface answers: by then it has read its configuration and is who it stays.
func (s *supervised) live(t *testing.T) {
	t.Helper()
	await(t, "envoy's admin interface", func() bool {
		_, err := s.admin.openConnections(t.Context())
		return err == nil
	})
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("no %s within 30 s", what)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// facts reads /proc/PID/status.
func facts(t *testing.T, pid int) map[string]string {
	t.Helper()
	return status(t, fmt.Sprintf("/proc/%d/status", pid))
}

func status(t *testing.T, path string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(text)) {
		k, v, _ := strings.Cut(line, ":")
		out[k] = strings.Join(strings.Fields(v), " ")
	}
	return out
}

func TestOwnUserHasNoPrivilege(t *testing.T) {
	if podtest.SingleUser() {
		_, err := New(Config{Path: podtest.Envoy(t), Concurrency: 1, Privilege: OwnUser})
		if err == nil || !strings.Contains(err.Error(), "--exempt mark") {
			t.Fatalf("without a user for envoy: %v, want the way out", err)
		}
		return
	}
	s := supervise(t, OwnUser)
	pid := <-s.pids
	s.live(t)
	four := func(id uint32) string { return strings.TrimSpace(strings.Repeat(strconv.Itoa(int(id))+" ", 4)) }
	user := s.cfg.User
	f := facts(t, pid)
	for key, want := range map[string]string{
		"Uid": four(user.UID), "Gid": four(user.GID), "Groups": "", "NoNewPrivs": "1",
		"CapEff": "0000000000000000", "CapPrm": "0000000000000000", "CapInh": "0000000000000000", "CapAmb": "0000000000000000",
		"CapBnd": "0000000000000000",
	} {
		if f[key] != want {
			t.Errorf("%s: %q, want %q", key, f[key], want)
		}
	}
	if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); err != nil || len(env) != 0 {
		t.Errorf("environment %q, %v", env, err)
	}
	for path, want := range map[string]os.FileMode{"": 0o700 | os.ModeDir, "admin.sock": 0o600 | os.ModeSocket} {
		st, err := os.Stat(filepath.Join(s.cfg.Dir, path))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode() != want || st.Sys().(*syscall.Stat_t).Uid != user.UID {
			t.Errorf("%s: %s of user %d, want %s of user %d", st.Name(), st.Mode(), st.Sys().(*syscall.Stat_t).Uid, want, user.UID)
		}
	}
}

func TestSharedUserCanOnlyMark(t *testing.T) {
	s := supervise(t, SharedUser)
	pid := <-s.pids
	s.live(t)
	f := facts(t, pid)
	const netRaw = "0000000000002000"
	for _, key := range []string{"CapEff", "CapPrm", "CapBnd"} {
		if f[key] != netRaw {
			t.Errorf("%s: %q, want CAP_NET_RAW alone", key, f[key])
		}
	}
	if f["NoNewPrivs"] != "1" {
		t.Error("envoy can gain privileges")
	}
	// Of this process only the thread that waits for Envoy has given up anything.
	if own := status(t, "/proc/thread-self/status"); own["CapBnd"] == netRaw || own["NoNewPrivs"] != "0" {
		t.Error("the agent itself lost its privileges")
	}
}

func TestDeadEnvoyIsStartedAgain(t *testing.T) {
	s := supervise(t, SharedUser)
	first := <-s.pids
	for i := range 2 {
		if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		next := <-s.pids
		if next == first {
			t.Fatal("the same process")
		}
		first = next
		await(t, "log of the death", func() bool { return strings.Count(s.log.String(), "signal: killed") == i+1 })
	}
	s.live(t)
}

func TestStopWithoutAnswer(t *testing.T) {
	s := supervise(t, SharedUser)
	pid := <-s.pids
	s.live(t)
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil { // it answers nothing and takes no SIGTERM
		t.Fatal(err)
	}
	s.cfg.DrainTimeout = 100 * time.Millisecond // Run reads it only when it stops
}

func TestCannotStart(t *testing.T) {
	dir := podtest.Dir(t)
	cfg := Config{Path: filepath.Join(dir, "none"), Dir: filepath.Join(dir, "envoy"), Pod: "a/b", AgentSocket: "/s",
		Privilege: SharedUser, Concurrency: 1, Logger: slog.New(slog.DiscardHandler), Started: func(int) {}, Exited: func() {}}
	if _, err := New(cfg); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no binary: %v", err)
	}
	broken := filepath.Join(dir, "broken")
	if err := os.WriteFile(broken, []byte("no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	cfg.Path = broken
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "start envoy") {
		t.Errorf("broken binary: %v", err)
	}
	cfg.Concurrency = 0
	if _, err := New(cfg); err == nil {
		t.Error("no worker: accepted")
	}
	cfg.Concurrency, cfg.Privilege = 1, "root"
	if _, err := New(cfg); err == nil {
		t.Error("unknown privilege: accepted")
	}
}

// An agent that is killed takes its Envoy with it.
func TestEnvoyDiesWithTheAgent(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), runAgent+"="+filepath.Join(podtest.Dir(t), "envoy"), "MANTLET_ENVOY="+podtest.Envoy(t))
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscan(out, &pid); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	await(t, "end of envoy", func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		return err != nil || bytes.Contains(text, []byte("State:\tZ"))
	})
}
