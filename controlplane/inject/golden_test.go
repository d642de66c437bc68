package inject

import (
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
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/xds/proxyuser"
)

var update = flag.Bool("update", false, "rewrite the wanted files of the goldens")

func testConfig() Config {
	return Config{Image: "registry.example/mantlet@sha256:0123", ControlPlane: "mantlet.mantlet-system.svc:15012", TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local")}
}

// testSeed is that of the tests' pods.
var testSeed = proxyuser.Seed{7: 1, 15: 2}

// TestGolden holds a pod against what becomes of it. An archive's comment may hold lines `capture node`, `podSecurity ignored` and `default`;
// its pod.yaml and namespace.yaml are the input, all other files are wanted: injected.yaml and patch, refused, left, warnings.
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
			want := map[string]string{}
			var inputs []txtar.File
			for _, f := range a.Files {
				if f.Name == "pod.yaml" || f.Name == "namespace.yaml" {
					inputs = append(inputs, f)
				} else {
					want[f.Name] = string(f.Data)
				}
			}
			got := render(t, string(a.Comment), inputs)
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

func render(t *testing.T, comment string, inputs []txtar.File) map[string]string {
	t.Helper()
	cfg := testConfig()
	for line := range strings.Lines(comment) {
		switch strings.TrimSpace(line) {
		case "capture node":
			cfg.Capture = CaptureNode
		case "podSecurity ignored":
			cfg.PodSecurity = PodSecurityIgnored
		case "default":
			cfg.Default = true
		}
	}
	var pod corev1.Pod
	var namespace corev1.Namespace
	for _, f := range inputs {
		var into any = &pod
		if f.Name == "namespace.yaml" {
			into = &namespace
		}
		if err := yaml.UnmarshalStrict(f.Data, into); err != nil {
			t.Fatalf("%s: %v", f.Name, err)
		}
	}
	if pod.Namespace != namespace.Name {
		t.Fatalf("the pod's namespace is %q, and that of namespace.yaml %q", pod.Namespace, namespace.Name)
	}
	got := map[string]string{}
	r, err := Inject(&pod, NamespaceOf(&namespace), cfg, testSeed)
	if refusal := new(Refusal); errors.As(err, &refusal) {
		got["refused"] = refusal.Error() + "\n"
		return got
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Warnings) > 0 {
		got["warnings"] = strings.Join(r.Warnings, "\n") + "\n"
	}
	if r.Left != "" {
		got["left"] = r.Left + "\n"
		return got
	}
	out, err := yaml.Marshal(r.Pod)
	if err != nil {
		t.Fatal(err)
	}
	var paths strings.Builder // the values are those of injected.yaml; TestPatch holds both equal
	for _, op := range r.Patch {
		paths.WriteString(op.Op + " " + op.Path + "\n")
	}
	got["injected.yaml"], got["patch"] = string(out), paths.String()
	return got
}

func asJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
