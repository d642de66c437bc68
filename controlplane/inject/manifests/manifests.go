// Package manifests gives the pods of manifests their sidecars, in the text of the manifests.
//
//	files ──► documents ──► objects ──► pod templates ──► inject.Inject ──► patch ──► the same documents
//
// What has no pods comes out byte for byte; order and comments stay. A document that has pods is written anew, so that its indentation
// may change; if it uses aliases or merge keys these are resolved, and its comments go.
package manifests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	yaml3 "go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/inject"
)

// File is a text with manifests, YAML or JSON.
type File struct {
	Name string // for messages
	Text []byte
}

// Options of [Inject].
type Options struct {
	// Config says what a sidecar is. Its Default is for namespaces that the files declare without the label policy.InjectLabel; pods of
	// namespaces that they do not declare are given one.
	Config inject.Config
	// Namespace is where objects are that name none.
	Namespace string
}

// Result is what became of the files.
type Result struct {
	// Documents are those of all files in their order, YAML, without the markers between them.
	Documents [][]byte
	// Injected and Left name the workloads, "Kind namespace/name", those that were left with the reason.
	Injected, Left []string
	Warnings       []string
}

// Inject gives a sidecar to the pods of all files. Namespaces in the files count with their labels and annotations; of others nothing is
// known. The error names everything that is refused or cannot be read, a line or more each; there is no result then.
func Inject(files []File, o Options) (*Result, error) {
	run := &run{o: o, namespaces: map[string]inject.Namespace{}}
	var docs []*document
	for _, f := range files {
		for _, d := range split(f) {
			if err := d.read(); err != nil {
				run.errs = append(run.errs, err)
				continue
			}
			docs = append(docs, d)
		}
	}
	for _, d := range docs {
		run.eachObject(d, run.noteNamespace)
	}
	for _, d := range docs {
		run.eachObject(d, run.object)
		out, err := d.out()
		if err != nil {
			run.errs = append(run.errs, err)
			continue
		}
		run.result.Documents = append(run.result.Documents, out)
	}
	if len(run.errs) > 0 {
		return nil, errors.Join(run.errs...)
	}
	return &run.result, nil
}

type run struct {
	o          Options
	namespaces map[string]inject.Namespace
	result     Result
	errs       []error
}

// object is an object of a document.
type object struct {
	doc  *document
	node *yaml3.Node // the mapping
	kind struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
	}
}

// metadata is what counts of an object's metadata.
type metadata struct {
	Name         string            `json:"name"`
	GenerateName string            `json:"generateName"`
	Namespace    string            `json:"namespace"`
	Labels       map[string]string `json:"labels"`
	Annotations  map[string]string `json:"annotations"`
}

// metadata reads it; on error it has said so.
func (r *run) metadata(o *object) (m metadata, ok bool) {
	n := child(o.node, "metadata")
	if n == nil {
		return m, true
	}
	if err := decode(n, &m); err != nil {
		r.errs = append(r.errs, fmt.Errorf("%s: %s: metadata: %w\n  hint: names, labels and annotations are strings; put quotes around y, no, 1 and the like", o.place(n), o.kind.Kind, err))
		return m, false
	}
	return m, true
}

// templates says where the pod is in an object of a kind.
var templates = map[string][]string{
	"v1/Pod":                   {},
	"v1/PodTemplate":           {"template"},
	"v1/ReplicationController": {"spec", "template"},
	"apps/v1/Deployment":       {"spec", "template"},
	"apps/v1/ReplicaSet":       {"spec", "template"},
	"apps/v1/StatefulSet":      {"spec", "template"},
	"apps/v1/DaemonSet":        {"spec", "template"},
	"batch/v1/Job":             {"spec", "template"},
	"batch/v1/CronJob":         {"spec", "jobTemplate", "spec", "template"},
}

// listDepth bounds Lists in Lists.
const listDepth = 8

// eachObject calls do for the objects of a document, those in Lists one by one.
func (r *run) eachObject(d *document, do func(*object)) { r.walk(d, d.content(), "", listDepth, do) }

func (r *run) walk(d *document, n *yaml3.Node, of string, depth int, do func(*object)) {
	if n == nil || n.Kind != yaml3.MappingNode {
		return
	}
	o := &object{doc: d, node: n}
	if err := decode(n, &o.kind); err != nil {
		return // not an object: what it is is not for us to say
	}
	if o.kind.Kind == "" { // items of a typed list need not say what they are
		o.kind.APIVersion, o.kind.Kind, _ = cutLast(of)
	}
	if items := child(n, "items"); strings.HasSuffix(o.kind.Kind, "List") && items != nil && items.Kind == yaml3.SequenceNode && depth > 0 {
		kind := strings.TrimSuffix(o.kind.Kind, "List")
		for _, item := range items.Content {
			r.walk(d, item, o.kind.APIVersion+"/"+kind, depth-1, do)
		}
		return
	}
	do(o)
}

func cutLast(s string) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 {
		return "", s, false
	}
	return s[:i], s[i+1:], true
}

func (r *run) noteNamespace(o *object) {
	if o.kind.APIVersion == "v1" && o.kind.Kind == "Namespace" {
		if m, ok := r.metadata(o); ok {
			r.namespaces[m.Name] = inject.Namespace{Name: m.Name, Labels: m.Labels, Annotations: m.Annotations}
		}
	}
}

// namespaceOf is an object's namespace, and the configuration for it.
func (r *run) namespaceOf(m metadata) (inject.Namespace, inject.Config) {
	name := m.Namespace
	if name == "" {
		name = r.o.Namespace
	}
	cfg := r.o.Config
	if ns, ok := r.namespaces[name]; ok {
		return ns, cfg
	}
	cfg.Default = true
	return inject.Namespace{Name: name}, cfg
}

// object injects the pod that an object is or makes.
func (r *run) object(o *object) {
	path, ok := templates[o.kind.APIVersion+"/"+o.kind.Kind]
	if !ok {
		return
	}
	m, ok := r.metadata(o)
	if !ok {
		return
	}
	ns, cfg := r.namespaceOf(m)
	name := m.Name
	if name == "" {
		name = m.GenerateName + "…"
	}
	called := fmt.Sprintf("%s %s/%s", o.kind.Kind, ns.Name, name)
	node := o.node
	for _, key := range path {
		if node = child(node, key); node == nil {
			r.errs = append(r.errs, fmt.Errorf("%s: %s: %s: missing\n  hint: it makes pods of this template", o.place(o.node), called, strings.Join(path, ".")))
			return
		}
	}
	var pod corev1.Pod
	if err := decode(node, &pod); err != nil {
		r.errs = append(r.errs, fmt.Errorf("%s: %s: %w", o.place(node), called, err))
		return
	}
	if pod.Name == "" {
		pod.Name = name
	}
	got, err := inject.Inject(&pod, ns, cfg, inject.Seed(&pod, ns))
	if refusal := new(inject.Refusal); errors.As(err, &refusal) {
		for _, reason := range refusal.Reasons {
			r.errs = append(r.errs, fmt.Errorf("%s: %s: %s", o.place(node), called, below(path, reason)))
		}
		return
	}
	if err != nil {
		r.errs = append(r.errs, err)
		return
	}
	if got.Left != "" { // a warning would say no more
		r.result.Left = append(r.result.Left, called+": "+got.Left)
		return
	}
	r.result.Warnings = append(r.result.Warnings, got.Warnings...)
	r.result.Injected = append(r.result.Injected, called)
	if err := o.doc.patch(node, got.Patch); err != nil {
		r.errs = append(r.errs, fmt.Errorf("%s: %s: %w", o.place(node), called, err))
	}
}

// below writes a reason with its field as it is in the object.
func below(path []string, r inject.Reason) string {
	if r.Field != "" && len(path) > 0 {
		r.Field = strings.Join(path, ".") + "." + r.Field
	}
	text, hint := r, r.Hint
	text.Hint = ""
	if hint == "" {
		return text.String()
	}
	return text.String() + "\n  hint: " + hint
}

func (o *object) place(n *yaml3.Node) string {
	return fmt.Sprintf("%s:%d", o.doc.file, o.doc.line-1+max(1, n.Line))
}

// decode reads a node as the API server would read the object, except that unknown fields are passed over.
func decode(n *yaml3.Node, into any) error {
	text, err := yaml3.Marshal(n)
	if err != nil {
		return err
	}
	value, err := yaml.YAMLToJSON(text)
	if err != nil {
		return err
	}
	return kjson.UnmarshalCaseSensitivePreserveInts(value, into)
}

// JSON turns a document into indented JSON.
func JSON(document []byte) ([]byte, error) {
	value, err := yaml.YAMLToJSON(document)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, value, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}

// child is the value of a key of a mapping, or nil.
func child(n *yaml3.Node, key string) *yaml3.Node {
	if n == nil || n.Kind != yaml3.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

// setChild sets a key of a mapping; a new one goes to the end.
func setChild(n *yaml3.Node, key string, value *yaml3.Node) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			n.Content[i+1] = value
			return
		}
	}
	n.Content = append(n.Content, &yaml3.Node{Kind: yaml3.ScalarNode, Tag: "!!str", Value: key}, value)
}
