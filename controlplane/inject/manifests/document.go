package manifests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	yaml3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/inject"
)

// document is one YAML document of a file, or one JSON value.
type document struct {
	file    string
	line    int // of its first line in the file, from 1
	text    []byte
	root    yaml3.Node
	changed bool
}

// split cuts a file at its document markers, which are left out. Documents of nothing but comments and blank lines go to the next one.
func split(f File) []*document {
	var docs []*document
	cur := &document{file: f.Name, line: 1}
	content, number := false, 0
	text := bytes.TrimPrefix(f.Text, []byte("\ufeff"))
	for line := range bytes.Lines(text) {
		number++
		if marker(line, "---") || marker(line, "...") {
			if content {
				docs = append(docs, cur)
				cur, content = &document{file: f.Name, line: number + 1}, false
			}
			rest := bytes.TrimSpace(line[3:])
			if len(rest) == 0 || rest[0] == '#' {
				if len(cur.text) == 0 {
					cur.line = number + 1
				} else {
					cur.text = append(cur.text, '\n') // so that lines can be counted
				}
				continue
			}
			line = append(bytes.Repeat([]byte(" "), 3), line[3:]...) // "--- {…}"
		}
		t := bytes.TrimSpace(line)
		content = content || len(t) > 0 && t[0] != '#' && line[0] != '%'
		cur.text = append(cur.text, line...)
	}
	if content {
		docs = append(docs, cur)
	}
	return docs
}

func marker(line []byte, m string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(m))
	return ok && (len(rest) == 0 || strings.ContainsRune(" \t\r\n", rune(rest[0])))
}

// read parses the document.
func (d *document) read() error {
	wrong := func(err error) error {
		hint := "mend it; kubectl apply --dry-run=client -f would refuse it too"
		if bytes.Contains(d.text, []byte("{{")) {
			hint = "this looks like a template: render it first and pass the result"
		}
		return fmt.Errorf("%s:%d: not YAML: %s\n  hint: %s", d.file, d.line, strings.TrimPrefix(err.Error(), "yaml: "), hint)
	}
	dec := yaml3.NewDecoder(bytes.NewReader(d.text))
	if err := dec.Decode(&d.root); err != nil {
		return wrong(err)
	}
	var more yaml3.Node
	if err := dec.Decode(&more); !errors.Is(err, io.EOF) {
		return wrong(errors.New("something follows the first value; part JSON values by a line ---"))
	}
	if _, err := yaml.YAMLToJSONStrict(d.text); err != nil { // also finds keys that are there twice
		return wrong(err)
	}
	if resolves(&d.root) {
		value, err := yaml.YAMLToJSON(d.text)
		if err != nil {
			return wrong(err)
		}
		d.root = yaml3.Node{}
		if err := yaml3.Unmarshal(value, &d.root); err != nil {
			return wrong(err)
		}
	}
	return nil
}

// resolves reports whether a tree holds aliases or merge keys, through which a change would reach further than meant.
func resolves(n *yaml3.Node) bool {
	return n.Kind == yaml3.AliasNode || n.Tag == "!!merge" || slices.ContainsFunc(n.Content, resolves)
}

func (d *document) content() *yaml3.Node {
	if len(d.root.Content) == 0 {
		return nil
	}
	return d.root.Content[0]
}

// out is the document's text, as it was where nothing has changed.
func (d *document) out() ([]byte, error) {
	if !d.changed {
		return append(bytes.TrimRight(d.text, "\n"), '\n'), nil
	}
	if c := d.content(); c.Style&yaml3.FlowStyle != 0 { // it was JSON
		block(c)
	}
	var b bytes.Buffer
	enc := yaml3.NewEncoder(&b)
	enc.SetIndent(2)
	enc.CompactSeqIndent()
	if err := errors.Join(enc.Encode(&d.root), enc.Close()); err != nil {
		return nil, fmt.Errorf("%s:%d: %w", d.file, d.line, err)
	}
	return b.Bytes(), nil
}

// block takes the style of JSON from a tree.
func block(n *yaml3.Node) {
	n.Style &^= yaml3.FlowStyle | yaml3.DoubleQuotedStyle
	for _, c := range n.Content {
		block(c)
	}
}

// patch applies what inject asks for to a pod.
func (d *document) patch(pod *yaml3.Node, ops []inject.Operation) error {
	for _, op := range ops {
		if err := apply(pod, op); err != nil {
			return fmt.Errorf("%s %s: %w", op.Op, op.Path, err)
		}
		d.changed = true
	}
	return nil
}

var unescape = strings.NewReplacer("~1", "/", "~0", "~")

// apply is one operation of a JSON patch. Mappings on the way that are missing or null are made: a template needs no metadata.
func apply(n *yaml3.Node, op inject.Operation) error {
	value, err := nodeOf(op.Value)
	if err != nil {
		return err
	}
	tokens := strings.Split(op.Path, "/")[1:]
	for i := range tokens {
		tokens[i] = unescape.Replace(tokens[i])
	}
	for _, key := range tokens[:len(tokens)-1] {
		next := child(n, key)
		if next == nil || next.Tag == "!!null" {
			next = &yaml3.Node{Kind: yaml3.MappingNode}
			setChild(n, key, next)
		}
		n = next
	}
	last := tokens[len(tokens)-1]
	n.Style &^= yaml3.FlowStyle // what is added is not to become one long line
	switch n.Kind {
	case yaml3.MappingNode:
		setChild(n, last, value)
		return nil
	case yaml3.SequenceNode:
		return applyToList(n, op.Op, last, value)
	}
	return errors.New("neither a mapping nor a list")
}

func applyToList(n *yaml3.Node, op, at string, value *yaml3.Node) error {
	i := len(n.Content)
	if at != "-" {
		var err error
		if i, err = strconv.Atoi(at); err != nil || i < 0 || i > len(n.Content) || op != "add" && i == len(n.Content) {
			return fmt.Errorf("no item %s in a list of %d", at, len(n.Content))
		}
	}
	switch op {
	case "add":
		n.Content = slices.Insert(n.Content, i, value)
	case "replace":
		n.Content[i] = value
	case "remove":
		n.Content = slices.Delete(n.Content, i, i+1)
	}
	return nil
}

// nodeOf is a value as YAML in block style.
func nodeOf(v any) (*yaml3.Node, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	if text, err = yaml.JSONToYAML(text); err != nil {
		return nil, err
	}
	var root yaml3.Node
	if err := yaml3.Unmarshal(text, &root); err != nil {
		return nil, err
	}
	return root.Content[0], nil
}
