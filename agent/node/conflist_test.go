package node

import (
	"encoding/json"
	"strings"
	"testing"
)

// The plugin comes last, in the manner of the list, and goes again without a trace, whoever wrote the list and however.
func TestConflist(t *testing.T) {
	entry := json.RawMessage(`{"stateDir":"/run","type":"mantlet-cni"}`)
	for name, c := range map[string]struct{ before, installed string }{
		"on one line": {
			`{"cniVersion":"1.0.0","plugins":[{"type":"bridge"},{"type":"portmap"}],"name":"pods"}`,
			`{"cniVersion":"1.0.0","plugins":[{"type":"bridge"},{"type":"portmap"},{"stateDir":"/run","type":"mantlet-cni"}],"name":"pods"}`,
		},
		"as people write": {
			"{\n  \"name\": \"cbr0\",\n  \"cniVersion\": \"0.3.1\",\n  \"plugins\": [\n    {\n      \"type\": \"flannel\",\n      \"delegate\": {\"isDefaultGateway\": true}\n    },\n" +
				"    {\"type\": \"portmap\", \"capabilities\": {\"portMappings\": true}}\n  ]\n}\n\n",
			"{\n  \"name\": \"cbr0\",\n  \"cniVersion\": \"0.3.1\",\n  \"plugins\": [\n    {\n      \"type\": \"flannel\",\n      \"delegate\": {\"isDefaultGateway\": true}\n    },\n" +
				"    {\"type\": \"portmap\", \"capabilities\": {\"portMappings\": true}},\n    {\"stateDir\":\"/run\",\"type\":\"mantlet-cni\"}\n  ]\n}\n\n",
		},
		"with tabs, CRLF and escapes": {
			"\r\n{\t\"n\\u0061me\":\"\\u00fc<ü\\/\",\r\n\t\"plugins\" : [ {\"type\" : \"a\"}\t]\t}\r\n",
			"\r\n{\t\"n\\u0061me\":\"\\u00fc<ü\\/\",\r\n\t\"plugins\" : [ {\"type\" : \"a\"}, {\"stateDir\":\"/run\",\"type\":\"mantlet-cni\"}\t]\t}\r\n",
		},
		"with numbers that floats do not hold": {
			`{"plugins": [{"type": "a", "n": 12345678901234567890.50}]}`,
			`{"plugins": [{"type": "a", "n": 12345678901234567890.50},{"stateDir":"/run","type":"mantlet-cni"}]}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			want := func(what, text string, entry json.RawMessage, want string) {
				t.Helper()
				if got, err := withEntry([]byte(text), entry); err != nil || string(got) != want {
					t.Errorf("%s: got %q, %v, want %q", what, got, err, want)
				}
			}
			want("put in", c.before, entry, c.installed)
			want("put in again", c.installed, entry, c.installed)
			want("taken out", c.installed, nil, c.before)
			want("taken out again", c.before, nil, c.before)
			// What others wrote between: another entry of ours, not the last, or twice.
			other := strings.Replace(c.installed, `"/run"`, `"/elsewhere"`, 1)
			want("another entry", other, entry, c.installed)
			first := strings.Replace(c.before, "[", `[ {"type":"mantlet-cni"}, `, 1)
			text, err := withEntry([]byte(first), entry)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(text), PluginName); n != 1 || strings.Index(string(text), PluginName) < strings.LastIndex(string(text), `"a`) || !json.Valid(text) {
				t.Errorf("an entry at the beginning: %s", text)
			}
			for _, twice := range []string{strings.Replace(c.installed, "[", `[{"type":"mantlet-cni"},`, 1), strings.Replace(c.installed, "[", `[{"type":"mantlet-cni"},{"type":"mantlet-cni"},`, 1)} {
				text, err := withEntry([]byte(twice), nil)
				if err != nil || strings.Contains(string(text), PluginName) || !sameJSON(text, json.RawMessage(c.before)) {
					t.Errorf("several entries, taken out: %s, %v", text, err)
				}
			}
		})
	}
	if got, err := withEntry([]byte(`{"plugins":[{"type":"a"},{"type":"mantlet-cni"} , {"type":"b"}]}`), nil); err != nil || string(got) != `{"plugins":[{"type":"a"} , {"type":"b"}]}` {
		t.Errorf("an entry in the middle: %s, %v", got, err)
	}
	if got, err := withEntry([]byte(`{"plugins":[ {"type":"mantlet-cni"} ]}`), nil); err != nil || string(got) != `{"plugins":[  ]}` {
		t.Errorf("alone, taken out: %s, %v", got, err)
	}

	for text, want := range map[string]string{
		``:                                     "unexpected end",
		`{"plugins":[{"type":"a"}]`:            "unexpected end",
		`{"plugins":[{"type":"a"}]} x`:         "invalid character 'x'",
		`[]`:                                   "no object",
		`{"type":"bridge"}`:                    "0 arrays plugins",
		`{"plugins":{}}`:                       "plugins: it is no array",
		`{"plugins":["a"]}`:                    "plugins: json: cannot unmarshal string",
		`{"plugins":[],"plugins":[]}`:          "2 arrays plugins",
		`{"plugins":[]}`:                       "no plugin that this one could come after",
		`{"plugins":[{"type":"mantlet-cni"}]}`: "no plugin that this one could come after",
	} {
		if got, err := withEntry([]byte(text), entry); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %q, %v, want %q", text, got, err, want)
		}
	}
}
