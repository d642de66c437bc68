package controlplane

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/xds"
	"github.com/mantlet/mantlet/xds/server"
)

var update = flag.Bool("update", false, "rewrite the wanted files of the goldens")

type nobody struct{}

func (nobody) Authenticate(context.Context) (server.Client, error) {
	return "", errors.New("nobody connects in this test")
}

// TestGolden holds manifests against what they come to. An archive's comment says what to render, a line each:
//
//	pod NAMESPACE/NAME                  verdicts, gate, rbac and outbound of its subject
//	on-demand NAMESPACE/NAME od|IP:PORT the cluster that the pod's sidecar gets for a destination
//
// Its files under manifests/ are the input; all others are wanted, each exactly, and none more. `make golden` rewrites them.
func TestGolden(t *testing.T) {
	archives, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(archives) == 0 {
		t.Fatalf("no archives: %v", err)
	}
	for _, file := range archives {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			want := map[string]string{}
			var inputs []txtar.File
			for _, f := range a.Files {
				rest, ok := strings.CutPrefix(f.Name, "manifests/")
				if !ok {
					want[f.Name] = string(f.Data)
					continue
				}
				inputs = append(inputs, f)
				if err := os.WriteFile(filepath.Join(dir, rest), f.Data, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got := render(t, dir, string(a.Comment))
			if *update {
				a.Files = inputs
				for _, name := range slices.Sorted(maps.Keys(got)) {
					a.Files = append(a.Files, txtar.File{Name: name, Data: []byte(got[name])})
				}
				if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got (run `make golden` if the change is meant):\n%s", diff)
			}
		})
	}
}

func render(t *testing.T, dir, comment string) map[string]string {
	t.Helper()
	m, err := source.ReadManifests([]string{dir}, source.Options{})
	if err != nil {
		t.Fatal(err)
	}
	cp, err := New(Config{
		Policy:         policy.Config{TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"), PodNetwork: m.PodNetwork},
		ServiceNetwork: m.ServiceNetwork,
	}, server.Config{Authenticator: nobody{}})
	if err != nil {
		t.Fatal(err)
	}
	defer cp.Server().Close()
	if err := cp.Load(&m.Objects); err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, line := range strings.Split(comment, "\n") {
		words := strings.Fields(line)
		switch {
		case len(words) == 2 && words[0] == "pod":
			p, ok := cp.index.Pod(words[1])
			if !ok {
				t.Fatalf("no pod %s", words[1])
			}
			v := cp.index.Verdicts(p.Subject.Key)
			j, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			got[words[1]+"/verdicts.yaml"] = asYAML(t, j)
			got[words[1]+"/gate.yaml"] = asText(t, xds.Gate(v).FilterChainMatcher)
			got[words[1]+"/rbac.yaml"] = asText(t, xds.RBAC(v))
			got[words[1]+"/outbound.yaml"] = asText(t, xds.Outbound(v, cp.network(p)).FilterChainMatcher)
		case len(words) == 3 && words[0] == "on-demand":
			name := words[1] + "/" + words[2] + ".yaml"
			r, ok := cp.Resolve(server.Client(words[1]), words[2])
			if !ok {
				got[name] = "unknown\n"
				continue
			}
			m, err := r.Any.UnmarshalNew()
			if err != nil {
				t.Fatal(err)
			}
			got[name] = asText(t, m)
		}
	}
	return got
}

func asText(t *testing.T, m proto.Message) string {
	t.Helper()
	j, err := protojson.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return asYAML(t, j)
}

func asYAML(t *testing.T, j []byte) string {
	t.Helper()
	y, err := yaml.JSONToYAML(j)
	if err != nil {
		t.Fatal(err)
	}
	return string(bytes.TrimSpace(y)) + "\n"
}
