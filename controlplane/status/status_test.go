package status

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/txtar"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "rewrite the wanted files of the goldens")

var now = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// TestGolden holds what replicas report against the tables. An archive holds a report a file, NAME.yaml, and NAME.unheard: why a replica did not
// answer. Wanted are table and wide, of all, and with a namespace in the comment, of that; each ends with the state.
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
			var reports []Report
			unheard, want := map[string]string{}, map[string]string{}
			var inputs []txtar.File
			for _, f := range a.Files {
				name, kind, _ := strings.Cut(f.Name, ".")
				switch kind {
				case "yaml":
					r := Report{Replica: name}
					if err := yaml.UnmarshalStrict(f.Data, &r); err != nil {
						t.Fatalf("%s: %v", f.Name, err)
					}
					reports = append(reports, r)
					inputs = append(inputs, f)
				case "unheard":
					unheard[name] = strings.TrimSpace(string(f.Data))
					inputs = append(inputs, f)
				default:
					want[f.Name] = string(f.Data)
				}
			}
			got := map[string]string{}
			for name, detail := range map[string]Detail{"table": Exceptions, "wide": Everybody} {
				got[name] = text(t, Merge(reports, unheard).In(strings.TrimSpace(string(a.Comment))), detail)
			}
			slices.Reverse(reports) // whoever answers first
			if again := text(t, Merge(reports, unheard).In(strings.TrimSpace(string(a.Comment))), Exceptions); again != got["table"] {
				t.Errorf("in another order: %s", cmp.Diff(got["table"], again))
			}
			if *update {
				a.Files = append(inputs, txtar.File{Name: "table", Data: []byte(got["table"])}, txtar.File{Name: "wide", Data: []byte(got["wide"])})
				if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s differs (run with -update): -want +got\n%s", file, diff)
			}
		})
	}
}

func text(t *testing.T, s Status, detail Detail) string {
	t.Helper()
	var b strings.Builder
	if err := s.Table(&b, detail, now); err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(raw), `{"state":"`+string(s.State)+`"`) {
		t.Errorf("JSON: %s", raw)
	}
	return b.String() + "state: " + string(s.State) + "\n"
}
