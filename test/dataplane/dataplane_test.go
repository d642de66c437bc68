package main

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mantlet/mantlet/sandbox"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// TestMain serves as the apps too: they are this binary.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == appArgument {
		fail(runApp(os.Args[2], os.Stdin, os.Stdout))
		return
	}
	netns.TestMain(m)
}

// binaries builds the agent with the race detector, and finds Envoy.
func binaries(t *testing.T) sandbox.Binaries {
	t.Helper()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	agent := filepath.Join(t.TempDir(), "mantlet-agent")
	build := exec.CommandContext(t.Context(), "go", "build", "-race", "-o", agent, "./cmd/mantlet-agent")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the agent: %v\n%s", err, out)
	}
	envoy := os.Getenv("MANTLET_ENVOY")
	if envoy == "" {
		envoy = filepath.Join(root, ".cache", "envoy", "envoy")
	}
	if _, err := os.Stat(envoy); err != nil {
		t.Fatalf("no Envoy: %v\nrun: make envoy", err)
	}
	return sandbox.Binaries{Agent: agent, Envoy: envoy}
}

// TestSmall makes one short round through every kind of path. A connection that fails anywhere fails it; what it takes says nothing.
func TestSmall(t *testing.T) {
	chosen, err := choose("raw,plaintext,linear-1,strict-100")
	if err != nil {
		t.Fatal(err)
	}
	f, err := measured(t.Context(), options{rounds: 1, each: 20 * time.Millisecond}, chosen, binaries(t))
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range f.Variants {
		for _, metric := range metrics {
			of := v.Median[metric.name]
			proxied := strings.Contains(metric.name, "cpu")
			agents := metric.name == "agent-cpu"
			wanted := !proxied || chosen[i].path >= permissive || chosen[i].path != direct && !agents
			if (of > 0) != wanted {
				t.Errorf("%s: %s is %v", v.Name, metric.name, of)
			}
		}
		if mtls := chosen[i].path >= linear; mtls != (v.Resumed > 0) {
			t.Errorf("%s: %.0f %% of its TLS sessions were resumed", v.Name, 100*v.Resumed)
		}
		if through := chosen[i].path != direct; through != (v.Envoy.Private > 0) {
			t.Errorf("%s: its Envoys hold %s", v.Name, v.Envoy)
		}
	}
	if len(f.Targets) == 0 {
		t.Error("no target was looked at")
	}
	var text bytes.Buffer
	if err := report("json", f, &text); err != nil {
		t.Fatal(err)
	}
	var back figures
	if err := json.Unmarshal(text.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	if len(back.Ratios) != len(f.Ratios) || len(back.Variants) != len(f.Variants) {
		t.Error("JSON lost something")
	}
	for _, tab := range tables(f) {
		for _, row := range tab.rows {
			if len(row) != len(tab.rows[0]) {
				t.Errorf("%s: row %q has not the columns of %q", tab.title, row, tab.rows[0])
			}
		}
	}
}

// TestConclude: ratios are those of one round, whatever rounds have done to both sides.
func TestConclude(t *testing.T) {
	chosen := []variant{{name: plainPair, path: plaintext}, {name: strictOne, path: strict, admitted: 1}, {name: "strict-10000", path: strict, admitted: 10_000}}
	m := &measurement{rest: make([]resting, 3), rounds: [][]round{
		{{"rate": 1000, "cpu": 100}, {"rate": 100, "cpu": 1000}, {"rate": 500, "cpu": 200}},
		{{"rate": 500, "cpu": 200}, {"rate": 40, "cpu": 2000}, {"rate": 300, "cpu": 300}},
		{{"rate": 500, "cpu": 200}, {"rate": 40, "cpu": 2200}, {"rate": 300, "cpu": 345}},
	}}
	f := conclude(chosen, m)
	for _, want := range []ratio{
		{"rate", strictOne, plainPair, 0.5, 0.4, 0.6},
		{"cpu", strictOne, plainPair, 2, 1.5, 2},
		{"cpu", "strict-10000", strictOne, 1.1, 1, 1.15},
	} {
		if got, ok := f.find(want.Metric, want.Of, want.To); !ok || got != want {
			t.Errorf("got %+v, want %+v", got, want)
		}
	}
	met := map[string]bool{}
	for _, g := range f.Targets {
		met[g.Metric+" "+g.Of] = g.Met
	}
	if len(met) != 2 || !met["cpu strict-10000"] || !met["rate strict-1"] {
		t.Errorf("targets: %v", met)
	}
	m.rounds[2][1]["cpu"] = 2400 // 1.20 of the first
	if f = conclude(chosen, m); f.Targets[0].Met {
		t.Errorf("%+v is met", f.Targets[0])
	}
}

func TestParse(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-for", "1us"}, {"-o", "xml"}, {"-variants", "strict-1,strict-2"}, {"-traffic", "rates"}, {"strict-1"}} {
		if _, err := parse(args); err == nil {
			t.Errorf("%v was accepted", args)
		}
	}
	o, err := parse([]string{"-variants", "strict-1,raw", "-rounds", "3"})
	if err != nil || o.rounds != 3 {
		t.Errorf("%+v, %v", o, err)
	}
	if chosen, err := choose(o.variants); err != nil || len(chosen) != 2 || chosen[0].name != rawTCP {
		t.Errorf("%+v, %v", chosen, err)
	}
}
