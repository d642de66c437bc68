package manifests

import (
	"bytes"
	"regexp"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/inject"
)

func options() Options {
	return Options{Namespace: "default", Config: inject.Config{
		Image: "registry.example/mantlet@sha256:01", ControlPlane: "mantlet.mantlet-system.svc:15012", TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"),
	}}
}

const spec = `{containers: [{name: app, image: x, securityContext: {runAsUser: 1}}]}`

// Every kind that makes pods gets the sidecar at its template, in a List too.
func TestKinds(t *testing.T) {
	for name, text := range map[string]string{
		"Pod":         `{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: ` + spec + `}`,
		"PodTemplate": `{apiVersion: v1, kind: PodTemplate, metadata: {name: a}, template: {spec: ` + spec + `}}`,
		"Deployment":  `{apiVersion: apps/v1, kind: Deployment, metadata: {name: a}, spec: {template: {spec: ` + spec + `}}}`,
		"StatefulSet": `{apiVersion: apps/v1, kind: StatefulSet, metadata: {name: a}, spec: {template: {metadata: null, spec: ` + spec + `}}}`,
		"DaemonSet":   `{apiVersion: apps/v1, kind: DaemonSet, metadata: {name: a}, spec: {template: {metadata: {}, spec: ` + spec + `}}}`,
		"ReplicaSet":  `{apiVersion: apps/v1, kind: ReplicaSet, metadata: {name: a}, spec: {template: {spec: ` + spec + `}}}`,
		"Job":         `{apiVersion: batch/v1, kind: Job, metadata: {name: a}, spec: {template: {spec: ` + spec + `}}}`,
		"CronJob":     `{apiVersion: batch/v1, kind: CronJob, metadata: {name: a}, spec: {jobTemplate: {spec: {template: {spec: ` + spec + `}}}}}`,
		"List":        `{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: ` + spec + `}]}`,
		"PodList":     `{apiVersion: v1, kind: PodList, items: [{metadata: {name: a}, spec: ` + spec + `}]}`,
		"Alias":       "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a, annotations: &a {x: why}}\nspec: {template: {metadata: {annotations: *a}, spec: " + spec + "}}",
		"Merge":       "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nx: &s " + spec + "\nspec:\n  <<: *s\n",
	} {
		for _, capture := range []inject.Capture{inject.CaptureSidecar, inject.CaptureNode} {
			once := injectText(t, name, text, capture)
			if n := bytes.Count(once, []byte("name: mantlet-proxy")); n != 1 {
				t.Errorf("%s: %d sidecars in\n%s", name, n, once)
			}
			if same := injectText(t, name, text, capture); !bytes.Equal(once, same) {
				t.Errorf("%s: once it is\n%s\nand then\n%s", name, once, same)
			}
			if twice := injectText(t, name, string(once), capture); !bytes.Equal(once, twice) {
				t.Errorf("%s: injected again it is\n%s\nand not\n%s", name, twice, once)
			}
			if name == "Alias" && bytes.Count(once, []byte("mantlet.dev/sidecar")) != 1 {
				t.Errorf("the object's own annotations have changed with the template's:\n%s", once)
			}
		}
	}
}

// In node mode workloads have users of their own, by their names and what runs in them.
func TestUsers(t *testing.T) {
	line := regexp.MustCompile(`runAsUser: (2\d{9})\n`)
	seen := map[string]string{}
	for _, text := range []string{
		`{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: ` + spec + `}`,
		`{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: b}, spec: ` + spec + `}`,
		`{apiVersion: apps/v1, kind: Deployment, metadata: {name: b}, spec: {template: {spec: ` + spec + `}}}`,
		`{apiVersion: apps/v1, kind: Deployment, metadata: {name: c}, spec: {template: {spec: ` + spec + `}}}`,
		`{apiVersion: apps/v1, kind: Deployment, metadata: {name: c}, spec: {template: {spec: ` + strings.Replace(spec, "image: x", "image: x2", 1) + `}}}`,
	} {
		user := line.FindSubmatch(injectText(t, text, text, inject.CaptureNode))
		if user == nil {
			t.Errorf("%s: the sidecar has no user", text)
			continue
		}
		if as, ok := seen[string(user[1])]; ok {
			t.Errorf("user %s is that of\n%s\nand of\n%s", user[1], as, text)
		}
		seen[string(user[1])] = text
	}
}

func injectText(t *testing.T, name, text string, capture inject.Capture) []byte {
	t.Helper()
	o := options()
	o.Config.Capture = capture
	r, err := Inject([]File{{Name: name, Text: []byte(text)}}, o)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return bytes.Join(r.Documents, []byte("---\n"))
}

func TestProblems(t *testing.T) {
	for text, want := range map[string]string{
		"a: [":                  "f:1: not YAML",
		"a: 1\na: 2":            `key "a" already set`,
		"x: {{ .Values.x }}":    "render it first",
		"\n---\n{a: 1}\n{b: 2}": "something follows the first value",
		"apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a}\nspec: {}": "Deployment default/a: spec.template: missing",
		"apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: []":             "Pod default/a: json:",
	} {
		_, err := Inject([]File{{Name: "f", Text: []byte(text)}}, options())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q in it", text, err, want)
		}
	}
}

// FuzzInject: whatever the text, what comes out says the same to a YAML reader where nothing was injected, and injecting again changes
// nothing.
func FuzzInject(f *testing.F) {
	f.Add("# c\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: " + spec)
	f.Add("--- {a: b}\n...\n# end\n--- # x\nkind: List\nitems: [null, 1, {kind: PodList, apiVersion: v1, items: []}]")
	f.Fuzz(func(t *testing.T, text string) {
		r, err := Inject([]File{{Name: "f", Text: []byte(text)}}, options())
		if err != nil {
			return
		}
		all := bytes.Join(r.Documents, []byte("---\n"))
		again, err := Inject([]File{{Name: "f", Text: all}}, options())
		if err != nil {
			t.Fatalf("%q: its own output %q: %v", text, all, err)
		}
		if len(again.Documents) != len(r.Documents) {
			t.Fatalf("%q: %d documents, read again %d", text, len(r.Documents), len(again.Documents))
		}
		for i, d := range r.Documents {
			one, err := yaml.YAMLToJSON(d)
			if err != nil {
				t.Fatalf("%q: %v", text, err)
			}
			two, err := yaml.YAMLToJSON(again.Documents[i])
			if err != nil || !bytes.Equal(one, two) {
				t.Fatalf("%q: %s, injected again %s (%v)", text, one, two, err)
			}
		}
	})
}
