package main

import (
	"encoding/json"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/mantlet/mantlet/controlplane/inject/names"
)

// instruction is one of a Dockerfile, with what follows its name as it is written.
type instruction struct{ name, args string }

// stages reads a Dockerfile: comments are left out, lines that end in a backslash go on in the next one, and FROM begins a stage.
func stages(t *testing.T, text string) (out [][]instruction) {
	t.Helper()
	whole := ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		before, more := strings.CutSuffix(line, "\\")
		whole += before
		if more {
			continue
		}
		name, args, _ := strings.Cut(whole, " ")
		i := instruction{strings.ToUpper(name), strings.TrimSpace(args)}
		switch whole = ""; {
		case i.name == "FROM":
			out = append(out, []instruction{i})
		case len(out) == 0:
			t.Fatalf("%s comes before the first FROM", i.name)
		default:
			out[len(out)-1] = append(out[len(out)-1], i)
		}
	}
	if whole != "" || len(out) == 0 {
		t.Fatalf("%d stages, and %q is left", len(out), whole)
	}
	return out
}

// one is the only instruction of a name.
func one(t *testing.T, stage []instruction, name string) string {
	t.Helper()
	var found []string
	for _, i := range stage {
		if i.name == name {
			found = append(found, i.args)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%s: %q, want one", name, found)
	}
	return found[0]
}

func list(t *testing.T, text string) (out []string) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), &out); err != nil { // the form that no shell reads
		t.Fatalf("%s: %v", text, err)
	}
	return out
}

func match(t *testing.T, file, pattern string) string {
	t.Helper()
	m := regexp.MustCompile(pattern).FindStringSubmatch(read(t, file))
	if m == nil {
		t.Fatalf("%s has nothing like %s", file, pattern)
	}
	return m[1]
}

// The image that `docker build` makes runs as this one does: the same user, the same program, the same Envoy, everything at the same place.
func TestDockerfile(t *testing.T) {
	all := stages(t, read(t, "../../Dockerfile"))
	if len(all) != 2 {
		t.Fatalf("%d stages, want one that builds and the image", len(all))
	}
	build, image := all[0], all[1]
	for _, i := range image {
		if !slices.Contains([]string{"FROM", "COPY", "USER", "ENTRYPOINT", "CMD"}, i.name) {
			t.Errorf("%s %s: nobody has held that against hack/image", i.name, i.args)
		}
	}

	want := config()
	if user := one(t, image, "USER"); user != want.User {
		t.Errorf("USER %s, and hack/image says %s", user, want.User)
	}
	if program := list(t, one(t, image, "ENTRYPOINT")); !slices.Equal(program, want.Entrypoint) {
		t.Errorf("ENTRYPOINT %q, and hack/image says %q", program, want.Entrypoint)
	}
	if args := list(t, one(t, image, "CMD")); len(args) != 0 || len(want.Cmd) != 0 { // without CMD that of Envoy's image would stay
		t.Errorf("CMD %q, and hack/image says %q", args, want.Cmd)
	}
	version := match(t, "../envoy.py", `(?m)^VERSION = "([0-9.]+)"$`)
	if from := one(t, image, "FROM"); from != "envoyproxy/envoy:distroless-v"+version {
		t.Errorf("FROM %s, and hack/envoy.py says %s", from, version)
	}

	copied := strings.Fields(one(t, image, "COPY"))
	if len(copied) < 3 || copied[0] != "--from=build" || copied[len(copied)-1] != binaries+"/" {
		t.Fatalf("COPY %q", copied)
	}
	var there []string
	for _, file := range copied[1 : len(copied)-1] {
		there = append(there, path.Base(file))
	}
	if !slices.Equal(there, programs) {
		t.Errorf("COPY brings %q, and hack/image %q", there, programs)
	}
	// Those who start them: sidecars, and the chart's pods (Envoy's image has Envoy at that path).
	if names.AgentBinary != binaries+"/mantlet-agent" || names.EnvoyBinary != binaries+"/envoy" {
		t.Errorf("sidecars start %s and %s", names.AgentBinary, names.EnvoyBinary)
	}
	for file, program := range map[string]string{"controlplane.yaml": "mantlet", "node.yaml": "mantlet-agent"} {
		if started := match(t, "../../install/chart/templates/"+file, `command: \[([^,]+),`); started != binaries+"/"+program {
			t.Errorf("%s starts %s", file, started)
		}
	}

	version = match(t, "../../go.mod", `(?m)^go ([0-9]+\.[0-9]+)`)
	if from := one(t, build, "FROM"); !strings.HasSuffix(from, " golang:"+version+" AS build") {
		t.Errorf("FROM %s, and go.mod says %s", from, version)
	}
	// As the Makefile builds them: static, without paths of the machine.
	made := match(t, "../../Makefile", `(?m)^\tCGO_ENABLED=0 \$\(GO\) build -trimpath -o bin/ (.+)$`)
	runs := slices.ContainsFunc(build, func(i instruction) bool {
		return i.name == "RUN" && strings.Contains(i.args, "CGO_ENABLED=0 ") && strings.HasSuffix(i.args, "go build -trimpath -o /out/ "+made)
	})
	if !runs {
		t.Errorf("no RUN builds %s as the Makefile does", made)
	}
}
