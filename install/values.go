package install

import (
	"errors"
	"fmt"
	"maps"
	"strings"

	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// merge puts values over others: maps key by key, all else as a whole. A null takes a key's value away, as in Helm.
func merge(into, over map[string]any) {
	for k, v := range over {
		next, ok := v.(map[string]any)
		below, both := into[k].(map[string]any)
		switch {
		case v == nil:
			delete(into, k)
		case ok && both:
			below = maps.Clone(below)
			merge(below, next)
			into[k] = below
		default:
			into[k] = v
		}
	}
}

// set is one --set: "a.b.c=value". A dot in a key is written "\."; the value is YAML, so that true, 2 and [a, b] mean what they look like.
func set(values map[string]any, s string) error {
	path, text, ok := strings.Cut(s, "=")
	if !ok || path == "" {
		return errors.New("not of the form key=value")
	}
	value, err := yaml.YAMLToJSONStrict([]byte(text))
	if err != nil {
		return fmt.Errorf("its value: %w", err)
	}
	var v any
	if err := kjson.UnmarshalCaseSensitivePreserveInts(value, &v); err != nil {
		return fmt.Errorf("its value: %w", err)
	}
	if v == nil && strings.TrimSpace(text) == "" {
		v = ""
	}
	keys := strings.Split(strings.ReplaceAll(path, `\.`, "\x00"), ".")
	over := map[string]any{}
	at := over
	for i, k := range keys {
		k = strings.ReplaceAll(k, "\x00", ".")
		if i == len(keys)-1 {
			at[k] = v
			break
		}
		next := map[string]any{}
		at[k], at = next, next
	}
	merge(values, over)
	return nil
}
