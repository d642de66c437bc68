package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
)

// edit makes an entry the only one of the plugin in a configuration list, and the last; nil: there is to be none. Every other byte stays as it is, so
// that what was put in is taken out again without a trace.
func edit(path string, entry json.RawMessage) (changed bool, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	edited, err := withEntry(text, entry)
	if err != nil {
		return false, fmt.Errorf("CNI configuration %s: %w", path, err)
	}
	if bytes.Equal(edited, text) {
		return false, nil
	}
	info, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	return true, replace(path, bytes.NewReader(edited), info.Mode().Perm())
}

// withEntry is the text of a configuration list with an entry as the only one of the plugin, and the last; nil: with none.
func withEntry(text []byte, entry json.RawMessage) ([]byte, error) {
	plugins, err := pluginsOf(text)
	if err != nil {
		return nil, err
	}
	var own []int
	for i, p := range plugins {
		if p.kind == PluginName {
			own = append(own, i)
		}
	}
	last := len(plugins) - 1
	if entry != nil && len(own) == 1 && own[0] == last && sameJSON(text[plugins[last].start:plugins[last].end], entry) {
		return text, nil
	}
	for _, i := range slices.Backward(own) {
		text, plugins = without(text, plugins, i)
	}
	if entry == nil {
		return text, nil
	}
	if len(plugins) == 0 {
		return nil, errors.New("it has no plugin that this one could come after")
	}
	end := plugins[len(plugins)-1]
	return slices.Concat(text[:end.end], []byte{','}, text[end.space:end.start], entry, text[end.end:]), nil
}

// without takes an element out, and the comma and the space between it and the one before, or the one after where it is the first.
func without(text []byte, plugins []element, i int) ([]byte, []element) {
	from, to := plugins[i].start, plugins[i].end
	switch {
	case i > 0:
		from = plugins[i-1].end
	case len(plugins) > 1:
		to = plugins[1].start
	}
	rest := slices.Delete(slices.Clone(plugins), i, i+1)
	for j := i; j < len(rest); j++ {
		rest[j].space, rest[j].start, rest[j].end = rest[j].space-(to-from), rest[j].start-(to-from), rest[j].end-(to-from)
	}
	if i == 0 && len(rest) > 0 { // what is before it now was before the one that went
		rest[0].space = plugins[0].space
	}
	return slices.Concat(text[:from], text[to:]), rest
}

// element is a plugin in the text of a list: text[space:start] is white space, text[start:end] the plugin.
type element struct {
	kind              string // its type
	space, start, end int
}

// pluginsOf finds the plugins of a configuration list (CNI specification 1.1.0, section 1: an object with the array "plugins").
func pluginsOf(text []byte) (list []element, err error) {
	var whole json.RawMessage
	if err := json.Unmarshal(text, &whole); err != nil { // what follows reads no further than to the end of the object
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(text))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("it is no object")
	}
	found := 0
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return nil, err
		}
		if key != "plugins" {
			if err := d.Decode(&whole); err != nil {
				return nil, err
			}
			continue
		}
		if list, err = elements(d, text); err != nil {
			return nil, fmt.Errorf("plugins: %w", err)
		}
		found++
	}
	if found != 1 {
		return nil, fmt.Errorf("it has %d arrays plugins, and a configuration list has one", found)
	}
	return list, nil
}

// elements reads the array that comes next.
func elements(d *json.Decoder, text []byte) (list []element, err error) {
	if t, err := d.Token(); err != nil || t != json.Delim('[') {
		return nil, errors.New("it is no array")
	}
	for d.More() {
		var raw json.RawMessage
		if err := d.Decode(&raw); err != nil {
			return nil, err
		}
		var head struct {
			Type string `json:"type"`
		}
		if err := json.Unmarshal(raw, &head); err != nil {
			return nil, err
		}
		e := element{kind: head.Type, end: int(d.InputOffset())}
		e.start = e.end - len(raw)
		e.space = len(bytes.TrimRight(text[:e.start], " \t\r\n"))
		list = append(list, e)
	}
	_, err = d.Token()
	return list, err
}

func sameJSON(a, b json.RawMessage) bool {
	var x, y bytes.Buffer
	return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}
