package agent

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/agent/podtest"
)

// While Envoy is away everything is refused; when it is back everything is as before.
func TestEnvoyDies(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	echo(t, w.outside.Listen(t, "[::]:9090"))
	// A link, so that Envoy can be kept from coming back for as long as this test looks.
	binary := filepath.Join(podtest.Dir(t), "envoy")
	relink := func(to string) {
		t.Helper()
		if err := os.Symlink(to, binary+".new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(binary+".new", binary); err != nil {
			t.Fatal(err)
		}
	}
	relink(podtest.Envoy(t))
	w.cfg.Envoy = binary
	w.startPlane()
	w.startAgent()
	w.ready()
	w.log.await(t, "log of readiness", func(s string) bool { return strings.Contains(s, "agent: ready") })
	relink("/bin/false")
	killEnvoy(t, w)
	w.log.await(t, "death", func(s string) bool { return strings.Contains(s, "signal: killed") })
	if err := Ready(t.Context(), w.cfg.RunDir, 0); err == nil {
		t.Error("ready without envoy")
	}
	w.refused("while envoy is away")
	if !podtest.SingleUser() {
		podtest.AsUser(1234, func() {
			reuse := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
				return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
			}}
			for _, address := range []string{"10.99.0.2:15006", "[::]:15006", "0.0.0.0:15006", "127.0.0.1:15001", "[::1]:15001"} {
				if l, err := reuse.Listen(t.Context(), "tcp", address); err == nil {
					l.Close()
					t.Errorf("an app can take %s while envoy is away", address)
				}
			}
		})
	}
	relink(podtest.Envoy(t))
	if err := Ready(t.Context(), w.cfg.RunDir, patience); err != nil {
		t.Fatal(err)
	}
	c, err := w.peer("10.99.0.2:8080")
	if err != nil {
		t.Fatal(err)
	}
	if got := greeted(t, c); got != "hello\n" {
		t.Errorf("after its return: %q", got)
	}
	c.Close()
	w.log.await(t, "log of the return", func(s string) bool { return strings.Count(s, "agent: ready") == 2 })
}

// killEnvoy kills the Envoy that the log tells of last.
func killEnvoy(t *testing.T, w *world) {
	t.Helper()
	if err := syscall.Kill(w.envoyPID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// envoyPID is the Envoy that the log tells of last.
func (w *world) envoyPID() int {
	w.t.Helper()
	text, _ := w.log.read()
	_, after, ok := strings.Cut(text[strings.LastIndex(text, "envoy: started"):], "pid=")
	pid := 0
	for _, c := range after {
		if c < '0' || c > '9' {
			break
		}
		pid = 10*pid + int(c-'0')
	}
	if !ok || pid == 0 {
		w.t.Fatal("no envoy in the log")
	}
	return pid
}

// An open connection may finish before the agent ends; nothing new begins.
func TestDrain(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	w.startPlane()
	w.startAgent()
	w.ready()
	c, err := w.peer("10.99.0.2:8080")
	if err != nil {
		t.Fatal(err)
	}
	hello := make([]byte, 6)
	if _, err := io.ReadFull(c, hello); err != nil {
		t.Fatal(err)
	}
	w.cancel()
	err = nil
	for deadline := time.Now().Add(patience); !errors.Is(err, syscall.ECONNREFUSED); {
		if time.Now().After(deadline) {
			t.Fatalf("still accepting: %v", err)
		}
		w.outside.Do(func() {
			var more net.Conn
			if more, err = net.Dial("tcp", "10.99.0.2:8080"); err == nil {
				more.Close()
			}
		})
	}
	if err := Ready(t.Context(), w.cfg.RunDir, 0); err == nil || !strings.Contains(err.Error(), "stopping") {
		t.Errorf("ready while stopping: %v", err)
	}
	select {
	case err := <-w.ended:
		t.Fatalf("the agent ended under an open connection: %v", err)
	default:
	}
	say(t, c, "still here")
	local := netip.MustParseAddrPort(c.LocalAddr().String())
	c.Close()
	w.stopAgent() // well before the drain timeout
	r := w.record("the connection that was open to the last", func(r flows.Record) bool { return r.Source == local })
	if r.Verdict != flows.Allowed || r.BytesReceived != 10 {
		t.Errorf("record: %+v", r)
	}
}

// A connection that does not finish is cut when time is up.
func TestDrainTimeout(t *testing.T) {
	w := newWorld(t)
	w.cfg.DrainTimeout = 200 * time.Millisecond
	w.app("[::]:8080")
	w.startPlane()
	w.startAgent()
	w.ready()
	c, err := w.peer("10.99.0.2:8080")
	if err != nil {
		t.Fatal(err)
	}
	hello := make([]byte, 6)
	if _, err := io.ReadFull(c, hello); err != nil {
		t.Fatal(err)
	}
	w.stopAgent()
	if n, err := c.Read(hello); err == nil {
		t.Errorf("the connection lives on: read %d bytes", n)
	}
}

// Without its control plane a sidecar enforces what it knows, and catches up when the control plane is back.
func TestControlPlaneGoesAndComes(t *testing.T) {
	w := newWorld(t)
	w.app("[::]:8080")
	w.startPlane()
	w.startAgent()
	w.ready()
	greeting := func() string {
		c, err := w.peer("10.99.0.2:8080")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return greeted(t, c)
	}
	w.stopPlane()
	w.log.await(t, "loss", func(s string) bool { return strings.Contains(s, "lost the control plane") })
	if err := Ready(t.Context(), w.cfg.RunDir, 0); err != nil {
		t.Errorf("with policy but without control plane: %v", err)
	}
	if got := greeting(); got != "hello\n" {
		t.Errorf("without a control plane: %q", got)
	}
	before, _ := w.log.read()
	w.startPlane()
	w.log.await(t, "return", func(s string) bool { return strings.Contains(s[len(before):], "connected to the control plane") })
	if err := w.cp.Apply(objects(8081).NetworkPolicies[0]); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); greeting() != ""; {
		if time.Now().After(deadline) {
			t.Fatal("the new policy does not arrive")
		}
	}
}

// Somebody's "nft flush ruleset" does not open the pod.
func TestRedirectIsGuarded(t *testing.T) {
	w := newWorld(t)
	w.startPlane()
	w.startAgent()
	w.ready()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.FlushRuleset()
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	w.log.await(t, "repair", func(s string) bool { return strings.Contains(s, "the table is in place again") })
	if err := Ready(t.Context(), w.cfg.RunDir, patience); err != nil {
		t.Error(err)
	}
}

func TestOneAgentPerRunDir(t *testing.T) {
	w := newWorld(t)
	w.startPlane()
	w.startAgent()
	w.ready()
	if err := Run(t.Context(), w.cfg); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("second agent: %v", err)
	}
}

func TestRefusedConfig(t *testing.T) {
	w := newWorld(t)
	defer cleanRedirect(t)
	for name, change := range map[string]func(*Config){
		"address":       func(c *Config) { c.ControlPlane = "nowhere" },
		"trust domain":  func(c *Config) { c.TrustDomain = spiffeid.TrustDomain{} },
		"bundle":        func(c *Config) { c.Bundle = nil },
		"token":         func(c *Config) { c.Token = nil },
		"pod":           func(c *Config) { c.Pod = "db" },
		"envoy":         func(c *Config) { c.Envoy = "/nonexistent" },
		"exempt":        func(c *Config) { c.Exempt = "all" },
		"run directory": func(c *Config) { c.RunDir = "" },
		"long path":     func(c *Config) { c.RunDir += "/" + strings.Repeat("x", 100) },
		"drain timeout": func(c *Config) { c.DrainTimeout = -1 },
	} {
		cfg := w.cfg
		change(&cfg)
		if err := Run(t.Context(), cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
