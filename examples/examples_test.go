// Package examples_test holds every example's matrix, thought out by hand, against the evaluator and against the oracle.
package examples_test

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/examples/expected"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/verdict"
)

// wanted are the examples that the documentation promises.
var wanted = []string{"allow-all", "block-in", "block-out", "database-from-one-service", "deny-all", "egress-dns-and-cidr", "namespace-isolation", "services", "shop"}

// folders are the folders here that hold manifests.
func folders(t *testing.T) []string {
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != "expected" {
			out = append(out, e.Name())
		}
	}
	return out
}

// read returns an example's manifests. What a reader warns of has no place in an example.
func read(t *testing.T, dir string) *source.Manifests {
	m, err := source.ReadManifests([]string{dir}, source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range m.Warnings {
		t.Errorf("warning: %s", w)
	}
	for kind := range m.Ignored {
		if kind != "v1/ConfigMap" && kind != "v1/Secret" {
			t.Errorf("%s is not read: the example says more than it shows", kind)
		}
	}
	return m
}

func load(t *testing.T, dir string) *expected.Matrix {
	m, err := expected.Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestFolders(t *testing.T) {
	if got := folders(t); !slices.Equal(got, wanted) {
		t.Errorf("examples: %v, wanted %v", got, wanted)
	}
}

func TestEvaluatorAgrees(t *testing.T) {
	for _, dir := range folders(t) {
		t.Run(dir, func(t *testing.T) {
			m, want := read(t, dir), load(t, dir)
			x := policy.NewIndex(policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"), PodNetwork: m.PodNetwork})
			if err := x.ApplyAll(&m.Objects); err != nil {
				t.Fatal(err)
			}
			attempts, err := matrix.Plan(m, want.Options)
			if err != nil {
				t.Fatal(err)
			}
			for _, line := range want.Diff(matrix.Simulate(x, attempts)) {
				t.Error(line)
			}
		})
	}
}

func TestOracleAgrees(t *testing.T) {
	for _, dir := range folders(t) {
		t.Run(dir, func(t *testing.T) {
			m, want := read(t, dir), load(t, dir)
			w := oracle.World{Objects: m.Objects, PodNetwork: m.PodNetwork, Mode: verdict.Permissive}
			pods := map[string]*corev1.Pod{}
			for _, p := range m.Objects.Pods {
				pods[p.Namespace+"/"+p.Name] = p
			}
			for _, l := range want.Lines {
				from, to := pods[l.From], pods[l.To]
				var targets []netip.Addr
				switch l.Via {
				case matrix.ViaService:
					continue // the oracle knows what comes after load balancing
				case matrix.ViaPod:
					targets = oracle.Addresses(to)
				case matrix.ViaExternal:
					targets = []netip.Addr{matrix.External{Prefix: netip.MustParsePrefix(l.To)}.Host()}
				}
				tried := 0
				for _, a := range oracle.Addresses(from) {
					for _, b := range targets {
						if a.Is4() != b.Is4() {
							continue
						}
						tried++
						c := oracle.Conn{From: from, FromAddr: a, To: to, ToAddr: b, Port: l.Port.Number, Protocol: l.Port.Protocol}
						if ok, why := w.Allowed(c); ok != (l.Verdict == matrix.Allowed) {
							t.Errorf("%s at %s: expected %s (line %d), oracle: %s", l.Key, b, l.Verdict, l.Number, why)
						}
					}
				}
				if tried != len(targets) || tried == 0 {
					t.Errorf("%s (line %d): %d of %d addresses tried", l.Key, l.Number, tried, len(targets))
				}
				mtls := l.Verdict == matrix.Allowed && l.Port.Protocol == verdict.TCP && from != to && oracle.Sidecar(from) && oracle.Sidecar(to)
				if mtls != (l.Auth == expected.MTLS) {
					t.Errorf("%s: expected %s (line %d), although TCP between two sidecars is %t", l.Key, l.Auth, l.Number, mtls)
				}
			}
		})
	}
}

// TestApplicable holds what a cluster would refuse, or never start, and the reader has no need to know.
func TestApplicable(t *testing.T) {
	for _, dir := range folders(t) {
		t.Run(dir, func(t *testing.T) {
			m := read(t, dir)
			for _, p := range m.Objects.Pods {
				for _, c := range p.Spec.Containers {
					if name, tag, ok := strings.Cut(c.Image, ":"); !ok || name == "" || tag == "" || tag == "latest" {
						t.Errorf("pod %s/%s: container %s: image %q names no fixed version", p.Namespace, p.Name, c.Name, c.Image)
					}
				}
				if p.Spec.ServiceAccountName == "default" {
					t.Errorf("pod %s/%s has no service account of its own", p.Namespace, p.Name)
				}
			}
			if got := len(m.Objects.Pods); got < 3 || got > 11 {
				t.Errorf("%d pods: too few to show anything, or too many to start in seconds", got)
			}
			if readme, err := os.ReadFile(dir + "/README.md"); err != nil || !strings.Contains(string(readme), "mantlet simulate -f examples/"+dir) {
				t.Errorf("README.md does not say how to simulate examples/%s (%v)", dir, err)
			}
		})
	}
}
