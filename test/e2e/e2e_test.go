// Package e2e runs the whole spine with real parts: control plane, agents, Envoys, packets.
package e2e

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
)

func TestMain(m *testing.M) { netns.TestMain(m) }

var trustDomain = spiffeid.RequireTrustDomainFromString("mantlet.local")

// builtAgent names, in the environment of a test that is run once more as another user, the agent that is built already.
const builtAgent = "MANTLET_E2E_AGENT"

// buildAgent builds the agent with the race detector, once: it is tested too.
var buildAgent = sync.OnceValues(func() (string, error) {
	if agent := os.Getenv(builtAgent); agent != "" {
		return agent, nil
	}
	enclosure, err := netns.Enclosed()
	if err != nil {
		return "", err
	}
	agent := filepath.Join(enclosure.RunDir, "mantlet-agent") // goes away with the enclosure
	build := exec.Command("go", "build", "-race", "-o", agent, "./cmd/mantlet-agent")
	build.Dir = filepath.Join("..", "..")
	out, err := build.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build the agent: %w\n%s", err, out)
	}
	return agent, nil
})

// binaries finds the programs that run in pods.
func binaries(t testing.TB) sandbox.Binaries {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	agent, err := buildAgent()
	if err != nil {
		t.Fatal(err)
	}
	envoy := os.Getenv("MANTLET_ENVOY")
	if envoy == "" {
		envoy = filepath.Join(root, ".cache", "envoy", "envoy")
	}
	if _, err := os.Stat(envoy); err != nil {
		t.Fatalf("no Envoy: %v\nrun: make envoy", err)
	}
	return sandbox.Binaries{Agent: agent, Envoy: envoy}
}

// start runs manifests until the test ends.
func start(t testing.TB, m *source.Manifests, o matrix.Options) *sandbox.Sandbox {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background()) // the agents live as long as this; each is given its own time to become ready
	t.Cleanup(cancel)
	s, err := sandbox.Start(ctx, sandbox.Config{
		Manifests: m,
		Policy:    policy.Config{TrustDomain: trustDomain, PodNetwork: m.PodNetwork},
		Options:   o,
		Binaries:  binaries(t),
		Log:       slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// manifests reads manifests from text.
func manifests(t testing.TB, text string) *source.Manifests {
	t.Helper()
	file := filepath.Join(t.TempDir(), "manifests.yaml")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	m, err := source.ReadManifests([]string{file}, source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// try makes attempts and fails the test on any mismatch between packets and evaluator.
func try(t *testing.T, s *sandbox.Sandbox, attempts []matrix.Attempt) *sandbox.Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	res, err := s.Try(ctx, attempts)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range res.Report.Connections {
		if c.Mismatch != "" {
			t.Errorf("%s → %s (%s:%d): %s", c.From, c.To, c.Address, c.Port, c.Mismatch)
		}
	}
	return res
}

func at(addr string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.MustParseAddr(addr), port)
}
