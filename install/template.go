package install

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/template"

	"sigs.k8s.io/yaml"
)

// execute renders the templates as Helm does: one set of names, .Values and .Release.
func execute(namespace string, values map[string]any) ([][]byte, error) {
	t := template.New("mantlet").Option("missingkey=error")
	t.Funcs(functions(t))
	for _, f := range append([]string{"_helpers.tpl"}, files...) {
		text, err := chart.ReadFile("chart/templates/" + f)
		if err != nil {
			return nil, err
		}
		if _, err := t.New(f).Parse(string(text)); err != nil {
			return nil, err
		}
	}
	data := map[string]any{
		"Values":  values,
		"Release": map[string]any{"Name": "mantlet", "Namespace": namespace},
	}
	var out [][]byte
	for _, f := range files {
		var b bytes.Buffer
		if err := t.ExecuteTemplate(&b, f, data); err != nil {
			failed := new(failure)
			if errors.As(err, &failed) {
				return nil, fmt.Errorf("values: %s", failed.text)
			}
			return nil, err
		}
		out = append(out, b.Bytes())
	}
	return out, nil
}

// failure is what a template itself refuses.
type failure struct{ text string }

func (f *failure) Error() string { return f.text }

// functions are those of Helm's that the chart uses, with the same results.
func functions(t *template.Template) template.FuncMap {
	indent := func(n int, s string) string {
		pad := strings.Repeat(" ", n)
		return pad + strings.ReplaceAll(s, "\n", "\n"+pad)
	}
	return template.FuncMap{
		"include": func(name string, data any) (string, error) {
			var b strings.Builder
			err := t.ExecuteTemplate(&b, name, data)
			return b.String(), err
		},
		"toYaml": func(v any) (string, error) {
			b, err := yaml.Marshal(v)
			return strings.TrimSuffix(string(b), "\n"), err
		},
		"toJson": func(v any) (string, error) {
			b, err := json.Marshal(v)
			return string(b), err
		},
		"indent":  indent,
		"nindent": func(n int, s string) string { return "\n" + indent(n, s) },
		"quote":   func(s string) string { return fmt.Sprintf("%q", s) },
		"required": func(text string, v any) (any, error) {
			if v == nil || v == "" {
				return nil, &failure{text}
			}
			return v, nil
		},
		"fail": func(text string) (string, error) { return "", &failure{text} },
		"sha256sum": func(s string) string {
			sum := sha256.Sum256([]byte(s))
			return hex.EncodeToString(sum[:])
		},
	}
}
