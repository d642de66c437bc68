package source

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	yaml3 "go.yaml.in/yaml/v3"
)

// maxLineLookup bounds the JSON text for which lines are looked up: finding them takes many times its memory.
const maxLineLookup = 16 << 20

// node is the document's content as a tree that knows lines; nil if there is none.
func (d *document) node() *yaml3.Node {
	if !d.read {
		d.read = true
		var root yaml3.Node
		// JSON is YAML, save for corner cases in which lines are simply not known.
		if len(d.text) <= maxLineLookup && yaml3.Unmarshal(d.text, &root) == nil {
			d.root = &root
		}
	}
	if d.root == nil || len(d.root.Content) == 0 {
		return nil
	}
	return d.root.Content[0]
}

// line finds the line of a field of the item, written as field.Path writes it, or of the nearest thing around it that exists.
func (it *item) line(field string) int {
	n := it.doc.node()
	if n == nil {
		return it.doc.line
	}
	line, path := n.Line, it.path
	if field != "" {
		path = strings.TrimPrefix(path+"."+field, ".")
	}
	for path != "" {
		at, child, rest := step(n, path)
		if child == nil {
			break
		}
		line, n, path = at, child, rest
	}
	return it.doc.fileLine(line)
}

// fileLine makes a line of the file of a line of the document. YAML also counts line breaks that editors do not show, and errors
// at the end may lie beyond it: the last line is the limit.
func (d *document) fileLine(n int) int {
	last := 1 + bytes.Count(bytes.TrimSuffix(d.text, []byte("\n")), []byte("\n"))
	return d.line + min(n, last) - 1
}

// step follows the first element of a path: the line at which the child begins, the child, and the rest of the path.
func step(n *yaml3.Node, path string) (int, *yaml3.Node, string) {
	if n.Kind == yaml3.AliasNode {
		n = n.Alias
	}
	switch n.Kind {
	case yaml3.SequenceNode:
		index, rest, ok := strings.Cut(strings.TrimPrefix(path, "["), "]")
		i, err := strconv.Atoi(index)
		if !ok || err != nil || i < 0 || i >= len(n.Content) {
			return 0, nil, ""
		}
		return n.Content[i].Line, n.Content[i], strings.TrimPrefix(rest, ".")
	case yaml3.MappingNode:
		// Keys may hold dots: the longest that fits is the one.
		var key, value *yaml3.Node
		var rest string
		for i := 0; i+1 < len(n.Content); i += 2 {
			k := n.Content[i]
			r, ok := strings.CutPrefix(path, k.Value)
			if !ok {
				r, ok = strings.CutPrefix(path, "["+k.Value+"]")
			}
			if ok && (r == "" || r[0] == '.' || r[0] == '[') && (key == nil || len(k.Value) > len(key.Value)) {
				key, value, rest = k, n.Content[i+1], strings.TrimPrefix(r, ".")
			}
		}
		if key != nil {
			return key.Line, value, rest
		}
	}
	return 0, nil, ""
}

// inspect refuses what a YAML tree may hold beyond JSON: keys given twice, and aliases that unfold to more than a file may hold.
func (d *document) inspect() Problems {
	t := treeCheck{doc: d, sizes: map[*yaml3.Node]int{}}
	size := t.size(d.root, "")
	if size > maxFileBytes {
		return d.broken(d.line, fmt.Sprintf("aliases (*name) unfold to more than %d MiB, or contain themselves", maxFileBytes>>20))
	}
	return t.problems
}

// object names the object that the document says it is, before it has been read.
func (d *document) object() string {
	value := func(n *yaml3.Node, path string) string {
		for path != "" {
			if _, n, path = step(n, path); n == nil {
				return ""
			}
		}
		return n.Value
	}
	n := d.node()
	return (&item{kind: value(n, "kind"), namespace: value(n, "metadata.namespace"), name: value(n, "metadata.name")}).object()
}

type treeCheck struct {
	doc      *document
	sizes    map[*yaml3.Node]int // bytes when unfolded; an alias inside its own anchor finds tooLarge
	problems Problems
}

const tooLarge = maxFileBytes + 1

func (t *treeCheck) size(n *yaml3.Node, path string) int {
	if s, ok := t.sizes[n]; ok {
		return s
	}
	t.sizes[n] = tooLarge
	s := len(n.Value) + 1
	switch n.Kind {
	case yaml3.AliasNode:
		s = t.size(n.Alias, path)
	case yaml3.MappingNode:
		first := map[string]*yaml3.Node{}
		for i := 0; i+1 < len(n.Content); i += 2 {
			k := n.Content[i]
			at := strings.TrimPrefix(path+"."+k.Value, ".")
			if dup, ok := first[k.Value]; ok && k.Kind == yaml3.ScalarNode {
				t.problems = append(t.problems, Problem{File: t.doc.file.name, Line: t.doc.fileLine(k.Line), Object: t.doc.object(), Field: at,
					Text: fmt.Sprintf("key %q is already in line %d", k.Value, t.doc.fileLine(dup.Line)), Hint: "remove one of them"})
			}
			first[k.Value] = k
			s += t.size(k, at) + t.size(n.Content[i+1], at)
		}
	default:
		for i, c := range n.Content {
			at := path
			if n.Kind == yaml3.SequenceNode {
				at = fmt.Sprintf("%s[%d]", path, i)
			}
			s += t.size(c, at)
		}
	}
	s = min(s, tooLarge)
	t.sizes[n] = s
	return s
}

// pathAt says which field of a JSON value the given byte belongs to.
func pathAt(value []byte, offset int64) string {
	type level struct {
		object bool
		key    string
		wants  bool // a key comes next
		index  int
	}
	var stack []level
	path := func() string {
		var b strings.Builder
		for _, l := range stack {
			if l.object {
				b.WriteString("." + l.key)
			} else {
				fmt.Fprintf(&b, "[%d]", l.index)
			}
		}
		return strings.TrimPrefix(b.String(), ".")
	}
	dec := json.NewDecoder(bytes.NewReader(value))
	for {
		tok, err := dec.Token()
		if err != nil {
			return ""
		}
		if d, ok := tok.(json.Delim); ok && (d == '}' || d == ']') {
			stack = stack[:len(stack)-1]
			if len(stack) > 0 {
				stack[len(stack)-1].wants = stack[len(stack)-1].object
			}
			continue
		}
		if len(stack) > 0 {
			top := &stack[len(stack)-1]
			if top.wants {
				top.key, _ = tok.(string)
				top.wants = false
				continue
			}
			if !top.object {
				top.index++
			}
		}
		if dec.InputOffset() >= offset {
			return path()
		}
		switch tok {
		case json.Delim('{'):
			stack = append(stack, level{object: true, wants: true})
		case json.Delim('['):
			stack = append(stack, level{index: -1})
		default:
			if len(stack) > 0 {
				stack[len(stack)-1].wants = stack[len(stack)-1].object
			}
		}
	}
}
