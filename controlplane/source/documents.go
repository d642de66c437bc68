package source

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	yaml3 "go.yaml.in/yaml/v3"
	"sigs.k8s.io/yaml"
)

// document is one YAML document or JSON value of a file.
type document struct {
	file *file
	line int // of its first line in the file, from 1
	text []byte
	root *yaml3.Node // made on demand, see node
	read bool        // root has been made, or cannot be
}

// item is one object of the input: a document, or an item of a List in it.
type item struct {
	doc        *document
	path       string // where it is in the document: "" or "items[3]"
	json       []byte
	apiVersion string
	kind       string
	namespace  string
	name       string
}

// object names the item for people.
func (it *item) object() string {
	name := it.name
	if it.namespace != "" {
		name = it.namespace + "/" + name
	}
	return strings.TrimSpace(it.kind + " " + name)
}

// at is a Problem of the item.
func (it *item) at(field, text, hint string) Problem {
	if strings.Contains(text, "{{") {
		hint = renderFirst
	}
	return Problem{File: it.doc.file.name, Line: it.line(field), Object: it.object(), Field: field, Text: text, Hint: hint}
}

// place writes "file:line" of the item.
func (it *item) place() string { return it.placeOf("") }

// placeOf writes "file:line" of a field of the item.
func (it *item) placeOf(field string) string {
	return fmt.Sprintf("%s:%d", it.doc.file.name, it.line(field))
}

const renderFirst = "this looks like a template: render it first (helm template, kustomize build) and pass the result"

// split cuts a file at its document markers ("---", and "..." at the end of a document). The markers stay with the text, so that
// the lines of a document can be counted.
func split(f *file) []*document {
	var docs []*document
	cur := &document{file: f, line: 1}
	content := false // cur holds more than blank lines, comments and directives
	flush := func(next int) {
		if content {
			docs = append(docs, cur)
		}
		cur, content = &document{file: f, line: next}, false
	}
	number := 0
	for line := range bytes.Lines(f.data) {
		number++
		switch {
		case isMarker(line, "---"):
			if content {
				flush(number)
			}
			content = true
		case isMarker(line, "..."):
			flush(number + 1)
			continue
		default:
			t := bytes.TrimSpace(line)
			content = content || len(t) > 0 && t[0] != '#' && line[0] != '%'
		}
		cur.text = append(cur.text, line...)
	}
	flush(number)
	return docs
}

func isMarker(line []byte, marker string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(marker))
	return ok && (len(rest) == 0 || strings.ContainsRune(" \t\r\n", rune(rest[0])))
}

// values turns a document into JSON values: one, or several where JSON objects follow one another, or none where it is empty.
func (d *document) values() ([]*item, Problems) {
	if bytes.HasPrefix(bytes.TrimSpace(d.text), []byte("{")) {
		items, offset, err := d.jsonValues()
		if err == nil {
			return items, nil
		}
		if strings.HasSuffix(strings.ToLower(d.file.name), ".json") {
			line := d.line + bytes.Count(d.text[:min(int(offset), len(d.text))], []byte("\n"))
			return nil, d.broken(line, "not JSON: "+err.Error())
		}
	}
	return d.yamlValue()
}

func (d *document) jsonValues() (items []*item, offset int64, err error) {
	dec := json.NewDecoder(bytes.NewReader(d.text))
	for {
		var raw json.RawMessage
		err := dec.Decode(&raw)
		if errors.Is(err, io.EOF) {
			return items, 0, nil
		}
		if err != nil {
			offset := dec.InputOffset()
			var syntax *json.SyntaxError
			if errors.As(err, &syntax) {
				offset = syntax.Offset
			}
			return nil, offset, err
		}
		end := dec.InputOffset()
		start := end - int64(len(raw))
		sub := &document{file: d.file, line: d.line + bytes.Count(d.text[:start], []byte("\n")), text: d.text[start:end]}
		items = append(items, &item{doc: sub, json: raw})
	}
}

func (d *document) yamlValue() ([]*item, Problems) {
	d.read = true
	dec := yaml3.NewDecoder(bytes.NewReader(d.text))
	var root, more yaml3.Node
	err := dec.Decode(&root)
	if errors.Is(err, io.EOF) {
		return nil, nil
	}
	if err == nil {
		if again := dec.Decode(&more); !errors.Is(again, io.EOF) {
			err = again
			if err == nil {
				err = fmt.Errorf("yaml: line %d: another document begins without ---", more.Line)
			}
		}
	}
	if err != nil {
		return nil, d.brokenYAML(err)
	}
	d.root = &root
	if ps := d.inspect(); len(ps) > 0 {
		return nil, ps
	}
	d.root, d.read = nil, false // it is many times as large as the text; made again when a line is asked for
	// What the API server sees is what this library makes of YAML: it is the one that kubectl uses.
	value, err := yaml.YAMLToJSONStrict(d.text)
	if err != nil {
		return nil, d.brokenYAML(err)
	}
	if bytes.Equal(value, []byte("null")) {
		return nil, nil
	}
	return []*item{{doc: d, json: value}}, nil
}

var yamlLine = regexp.MustCompile(`line (\d+): `)

// brokenYAML reports an error of a YAML library, which counts lines within the document.
func (d *document) brokenYAML(err error) Problems {
	text, line := strings.TrimPrefix(err.Error(), "yaml: "), 0
	if m := yamlLine.FindStringSubmatchIndex(text); m != nil {
		if n, err := strconv.Atoi(text[m[2]:m[3]]); err == nil {
			line = d.fileLine(n)
		}
		text = text[m[1]:]
	}
	return d.broken(line, "not YAML: "+strings.Join(strings.Fields(text), " "))
}

func (d *document) broken(line int, text string) Problems {
	p := Problem{File: d.file.name, Line: line, Text: text, Hint: "mend it; `kubectl apply --dry-run=client -f` would refuse it too"}
	if before, _, ok := bytes.Cut(d.text, []byte("{{")); ok {
		p.Hint = renderFirst
		if line == 0 {
			p.Line = d.line + bytes.Count(before, []byte("\n"))
		}
	}
	return Problems{p}
}
