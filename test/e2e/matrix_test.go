package e2e

import (
	"flag"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/examples/expected"
	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/verdict"
)

var (
	worlds = flag.Int("worlds", 8, "how many random worlds to run for real")
	seed   = flag.Uint64("seed", 0, "seed of the first world")
)

// TestExamples runs every example and holds the packets against the matrix that was thought out by hand, and against the evaluator.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob("../../examples/*/expected.txt")
	if err != nil || len(files) < 8 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	for _, f := range files {
		dir := filepath.Dir(f)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			want, err := expected.Load(dir)
			if err != nil {
				t.Fatal(err)
			}
			m, err := source.ReadManifests([]string{dir}, source.Options{})
			if err != nil {
				t.Fatal(err)
			}
			attempts := plan(t, m, want.Options)
			res := try(t, start(t, m, want.Options), attempts)
			for _, d := range want.Diff(res.Report) {
				t.Error(d)
			}
			for _, c := range res.Report.Connections {
				if c.Verdict == matrix.Allowed && c.Via == matrix.ViaPod && c.Protocol == verdict.TCP.String() && c.From != c.To && injected(m, c.From) && injected(m, c.To) && !c.Authenticated {
					t.Errorf("%s → %s:%d is allowed between two sidecars and not authenticated", c.From, c.To, c.Port)
				}
			}
		})
	}
}

// Endpoints of services outside the cluster answer without being asked for.
func TestEndpointsOutside(t *testing.T) {
	m, err := source.ReadManifests([]string{"../../examples/services"}, source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	reached := 0
	for _, c := range try(t, start(t, m, matrix.Options{}), plan(t, m, matrix.Options{})).Report.Connections {
		if c.Mismatch != "" {
			t.Errorf("%s → %s:%d: %s", c.From, c.To, c.Port, c.Mismatch)
		}
		if c.To == "orders/partner" && c.Verdict == matrix.Allowed {
			reached++
		}
	}
	if reached == 0 {
		t.Error("nobody may reach orders/partner, so that this shows nothing")
	}
}

// plan lists what real packets can try of all there is.
func plan(t *testing.T, m *source.Manifests, o matrix.Options) []matrix.Attempt {
	t.Helper()
	all, err := matrix.Plan(m, o)
	if err != nil {
		t.Fatal(err)
	}
	attempts, notices, err := sandbox.Tried(all)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range notices {
		t.Log(n)
	}
	return attempts
}

func injected(m *source.Manifests, name string) bool {
	for _, p := range m.Objects.Pods {
		if p.Namespace+"/"+p.Name == name {
			return p.Annotations[policy.SidecarAnnotation] == policy.SidecarInjected
		}
	}
	return false
}

// TestRandomWorlds runs random worlds: policies of every shape, identities that volatile labels split, pods without sidecar, single-stack
// pods, strict and permissive namespaces, named ports that differ. The evaluator that the packets are held against is itself held
// against the oracle in test/random.
func TestRandomWorlds(t *testing.T) {
	for i := range *worlds {
		n := *seed + uint64(i)
		w := oracle.Generate(rand.New(rand.NewPCG(n, 7)), oracle.Small)
		m := &source.Manifests{Objects: w.Objects, PodNetwork: w.PodNetwork}
		m.Objects.Pods = nil
		for _, p := range w.Objects.Pods {
			if !p.Spec.HostNetwork {
				m.Objects.Pods = append(m.Objects.Pods, p)
			}
		}
		o := matrix.Options{Ports: []matrix.Port{{Number: 80, Protocol: verdict.TCP}, {Number: 8081, Protocol: verdict.TCP}, {Number: 53, Protocol: verdict.UDP}}}
		attempts := plan(t, m, o)
		ok := t.Run("", func(t *testing.T) {
			res := try(t, start(t, m, o), attempts)
			t.Logf("world %d: %+v", n, res.Report.Summary)
		})
		if !ok {
			if os.Getenv("CI") == "" {
				t.Log(w.YAML())
			}
			t.Fatalf("world %d differs; reproduce it with -worlds 1 -seed %d", n, n)
		}
	}
}
