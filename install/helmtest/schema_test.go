package helmtest

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/strvals"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/install"
)

// What `mantlet install` refuses Helm refuses too, for the most part by values.schema.json.
func TestRefused(t *testing.T) {
	c, err := loader.Load("../chart")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../testdata/refused.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Name, Values string
		Set          []string
	}
	if err := yaml.Unmarshal(text, &cases); err != nil || len(cases) == 0 {
		t.Fatalf("%d cases: %v", len(cases), err)
	}
	for _, one := range cases {
		t.Run(one.Name, func(t *testing.T) {
			values, err := given(one.Values, one.Set)
			if err == nil {
				_, err = rendered(c, values)
			}
			if err == nil {
				t.Fatalf("helm takes %q %q", one.Values, one.Set)
			}
			t.Log(err)
		})
	}
}

// given reads what `helm template --values FILE --set-json …` would; the value of a set is YAML, as for `mantlet install --set`.
func given(file string, set []string) (chartutil.Values, error) {
	values, err := chartutil.ReadValues([]byte(file))
	if err != nil {
		return nil, err
	}
	for _, s := range set {
		if key, value, ok := strings.Cut(s, "="); ok {
			asJSON, err := yaml.YAMLToJSON([]byte(value))
			if err != nil {
				return nil, err
			}
			s = key + "=" + string(asJSON)
		}
		if err := strvals.ParseJSON(s, values); err != nil {
			return nil, err
		}
	}
	return values, nil
}

// The schema names the values that there are and no other, so that Helm does not take what `mantlet install` does not know.
func TestSchemaNamesTheValues(t *testing.T) {
	text, err := install.ShowValues()
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.Unmarshal(text, &values); err != nil {
		t.Fatal(err)
	}
	file, err := os.ReadFile("../chart/values.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	var s schema
	if err := json.Unmarshal(file, &s); err != nil {
		t.Fatal(err)
	}
	delete(s.Properties, "global") // Helm's own
	for _, wrong := range s.differs("", values) {
		t.Error(wrong)
	}
}

// schema is what the test reads of one.
type schema struct {
	Additional any               `json:"additionalProperties"`
	Properties map[string]schema `json:"properties"`
}

func (s schema) differs(path string, values map[string]any) (wrong []string) {
	if s.Additional != false {
		wrong = append(wrong, fmt.Sprintf("the schema lets %q have values of any name", path))
	}
	for name, below := range s.Properties {
		value, ok := values[name]
		if !ok {
			wrong = append(wrong, fmt.Sprintf("the schema has %s%s, and values.yaml has not", path, name))
		}
		if group, ok := value.(map[string]any); ok && len(below.Properties) > 0 {
			wrong = append(wrong, below.differs(path+name+".", group)...)
		}
	}
	for name := range values {
		if _, ok := s.Properties[name]; !ok {
			wrong = append(wrong, fmt.Sprintf("values.yaml has %s%s, and the schema has not", path, name))
		}
	}
	return wrong
}
