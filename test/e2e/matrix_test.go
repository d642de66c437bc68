package e2e

import (
	"flag"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
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

// Endpoints of services outside the cluster answer without being asked for, wherever they move.
func TestEndpointsOutside(t *testing.T) {
	const text = `
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {mantlet.dev/inject: enabled}}}
---
{apiVersion: v1, kind: Pod, metadata: {name: web, namespace: shop}, spec: {containers: [{name: c, image: i}]}}
---
{apiVersion: v1, kind: Service, metadata: {name: partner, namespace: shop}, spec: {ports: [{port: 80}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: partner-1, namespace: shop, labels: {kubernetes.io/service-name: partner}}
addressType: IPv4
endpoints: [{addresses: [ADDRESS]}]
ports: [{port: PORT, protocol: TCP}]
`
	at := func(address, port string) string {
		return strings.NewReplacer("ADDRESS", address, "PORT", port).Replace(text)
	}
	m := reread(t, at("203.0.113.7", "8080"), nil)
	s := start(t, m, matrix.Options{})
	reaches := func(what string) {
		t.Helper()
		reached := 0
		for _, c := range try(t, s, plan(t, m, matrix.Options{})).Report.Connections {
			if c.Mismatch != "" {
				t.Errorf("%s: %s → %s:%d: %s", what, c.From, c.To, c.Port, c.Mismatch)
			}
			if c.To == "shop/partner" && c.Verdict == matrix.Allowed {
				reached++
			}
		}
		if reached == 0 {
			t.Errorf("%s: nobody may reach shop/partner, so that this shows nothing", what)
		}
	}
	reaches("at first")
	for _, to := range [][2]string{{"203.0.113.7", "9090"}, {"203.0.113.8", "9090"}} {
		m = reread(t, at(to[0], to[1]), m)
		if _, err := s.Update(t.Context(), m); err != nil {
			t.Fatal(err)
		}
		reaches(to[0] + ":" + to[1])
	}
	if _, there := s.External(netip.MustParsePrefix("203.0.113.7/32")); there {
		t.Error("somebody answers still where no endpoint is any more")
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
