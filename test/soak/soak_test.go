// Package soak runs a sandbox for long, with edits, kills and restarts at random, and holds every connection against the evaluator.
package soak

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/test/hammer"
)

func TestMain(m *testing.M) { netns.TestMain(m) }

var (
	duration = flag.Duration("soak", 2*time.Minute, "how long")
	build    = flag.String("agent-build", "-race", "flag of go build for the agents; \"-trimpath\", for example, measures the memory of what is shipped")
	seed     = flag.Uint64("seed", 0, "of what is random; 0: another one each time")
)

// manifests are those of the contest, with a workload that scales and a database that speaks first.
const manifests = hammer.Contested + `
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, image: i, ports: [{containerPort: 9000}]}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 9000}]}
---
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}, annotations: {mantlet.dev/server-first: "5432"}}
spec: {containers: [{name: c, image: i, ports: [{containerPort: 5432}]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec: {podSelector: {matchLabels: {app: db}}, ingress: [{from: [{podSelector: {matchLabels: {app: web}}}, {podSelector: {matchLabels: {app: s2}}}]}]}
`

// Kills hit the mortals. The others live from beginning to end, so that what they leak adds up.
var (
	mortals   = []string{"shop/s1", "shop/always", "shop/never", "shop/a"}
	immortals = []string{"shop/s2", "shop/seesaw", "shop/db"}
)

// streamPort is of an app in shop/db that only streams reach; no manifest declares it, so that the matrix leaves it alone.
const streamPort = 9999

var trustDomain = spiffeid.RequireTrustDomainFromString("mantlet.local")

// soak is one run.
type soak struct {
	t       *testing.T
	ctx     context.Context
	rand    *rand.Rand
	file    string
	m       *source.Manifests
	replica int
	s       *sandbox.Sandbox
	arena   *hammer.Arena
	contest *hammer.Contest
	total   hammer.Tally
	done    map[string]int // steps, by name
	steps   []string       // what was done when
	wrong   int            // what was wrong when it was last looked at
	logs    []string       // of agents, of when something was wrong
	slowest time.Duration  // until a sidecar that was killed was back
	slow    string         // its agent's log
}

func TestSoak(t *testing.T) {
	number := *seed
	if number == 0 {
		number = rand.Uint64()
	}
	t.Logf("to repeat: -seed %d -soak %s", number, *duration)
	k := &soak{
		t: t, rand: rand.New(rand.NewPCG(number, 0)), file: filepath.Join(t.TempDir(), "manifests.yaml"), replica: 1, done: map[string]int{}, //nolint:gosec // not for secrets
	}
	var cancel context.CancelFunc
	k.ctx, cancel = context.WithCancel(context.Background())
	defer cancel()
	k.contest = hammer.NewContest(k.rand)
	if err := os.WriteFile(k.file, []byte(manifests), 0o644); err != nil {
		t.Fatal(err)
	}
	k.m = k.read()
	k.start()

	everybody := append(append([]string{}, mortals...), immortals...)
	warm := time.Now().Add(*duration / 10)
	for time.Now().Before(warm) {
		k.step()
	}
	before := k.figures(everybody)
	end := time.Now().Add(*duration * 9 / 10)
	for time.Now().Before(end) {
		k.step()
	}
	after := k.figures(everybody)
	if err := k.arena.Stop(); err != nil {
		t.Fatal(err)
	}
	k.judge()
	t.Logf("%v, %d states of policy, the slowest sidecar was back after %s\n%s%s", k.done, k.arena.History.Len(), k.slowest, &k.total, table(before, after))
	for _, c := range k.total.Complaints {
		t.Error(c)
	}
	for _, l := range append(k.logs, k.slow) {
		t.Log(l)
	}
	compare(t, before, after)
	if k.total.Denied == 0 || k.total.Allowed == 0 || k.total.Echoed == 0 {
		t.Error("too little was tried to prove anything")
	}
}

// read reads the manifests with the present policies of the contest and the present number of replicas.
func (k *soak) read() *source.Manifests {
	k.t.Helper()
	m, err := source.ReadManifests([]string{k.file}, source.Options{Replicas: k.replica, Previous: k.m})
	if err != nil {
		k.t.Fatal(err)
	}
	m.Objects.NetworkPolicies = append(m.Objects.NetworkPolicies, k.contest.Policies()...)
	return m
}

func (k *soak) config() policy.Config {
	return policy.Config{TrustDomain: trustDomain, PodNetwork: k.m.PodNetwork}
}

func (k *soak) start() {
	t := k.t
	var err error
	k.s, err = sandbox.Start(k.ctx, sandbox.Config{
		Manifests: k.m, Policy: k.config(), Binaries: binaries(t),
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.s.Close(); err != nil {
			t.Error(err)
		}
	})
	if k.arena, err = hammer.Enter(k.s, k.m, k.config()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.arena.Close)
	// Between two immortals, which no edit keeps apart: nothing excuses it if this breaks.
	s2, _ := k.s.Pod("shop/s2")
	db, _ := k.s.Pod("shop/db")
	open, err := k.arena.Open(db, streamPort)
	if err != nil {
		t.Fatal(err)
	}
	for _, to := range open {
		k.arena.Stream(s2, to)
	}
	always, _ := k.s.Pod("shop/always")
	for _, to := range k.arena.Targets {
		k.arena.Stream(always, to)
	}
}

// binaries builds the agent, with the race detector if not told otherwise, and finds Envoy.
func binaries(t *testing.T) sandbox.Binaries {
	t.Helper()
	enclosure, err := netns.Enclosed()
	if err != nil {
		t.Fatal(err)
	}
	b := sandbox.Binaries{Agent: filepath.Join(enclosure.RunDir, "mantlet-agent"), Envoy: os.Getenv("MANTLET_ENVOY")}
	cmd := exec.Command("go", "build", *build, "-o", b.Agent, "./cmd/mantlet-agent")
	cmd.Dir = filepath.Join("..", "..")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	if b.Envoy == "" {
		if b.Envoy, err = filepath.Abs("../../.cache/envoy/envoy"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(b.Envoy); err != nil {
		t.Fatalf("no Envoy: %v\nrun: make envoy", err)
	}
	return b
}

// figures brings everything to rest and measures.
func (k *soak) figures(pods []string) figures {
	busy := k.contest
	k.contest = hammer.NewContest(rand.New(rand.NewPCG(1, 1))) //nolint:gosec // the same policies whenever it is measured: rules are counted
	k.replica = 1
	k.update()
	k.contest = busy // until the next update
	defer k.arena.Pause()()
	time.Sleep(2 * time.Second) //nolint:forbidigo // Envoy keeps a listener that was replaced for a second, and tells nobody when it lets go
	return measure(k.t, k.s, pods)
}

// judge holds what was tried so far against the evaluator. It is for when nothing is being killed. What explains the first few wrong ones is kept: agents
// that are killed later take their logs along.
func (k *soak) judge() {
	k.total.Add(k.arena.Judge())
	if k.total.Wrong == k.wrong || len(k.logs) > maxLogs {
		return
	}
	k.logs = append(k.logs, fmt.Sprintf("%d wrong (%d before) after these steps:\n%s", k.total.Wrong, k.wrong, strings.Join(k.steps[max(0, len(k.steps)-lastSteps):], "\n")))
	k.wrong = k.total.Wrong
	for _, name := range append(append([]string{}, mortals...), immortals...) {
		k.logs = append(k.logs, fmt.Sprintf("the agent of %s:\n%s", name, k.s.AgentLog(name)))
	}
}

const (
	lastSteps = 40
	maxLogs   = 20
)

var errTooLate = errors.New("it took too long")

// within bounds one step: something that hangs is a failure too.
func (k *soak) within(f func(ctx context.Context) error) {
	k.t.Helper()
	ctx, cancel := context.WithTimeoutCause(k.ctx, 2*time.Minute, errTooLate)
	defer cancel()
	if err := f(ctx); err != nil {
		k.t.Fatalf("%v (%v)", err, context.Cause(ctx))
	}
}
