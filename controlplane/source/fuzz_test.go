package source

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
)

// FuzzReadManifests: no input makes the reader panic; what it accepts is consistent, and is the same when read again; what it
// refuses it explains.
func FuzzReadManifests(f *testing.F) {
	archives, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(archives) == 0 {
		f.Fatalf("no testdata: %v", err)
	}
	for _, path := range archives {
		ar, err := txtar.ParseFile(path)
		if err != nil {
			f.Fatal(err)
		}
		for _, file := range ar.Files {
			if file.Name != "want" && file.Name != "options" {
				f.Add(file.Data)
			}
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		read := func() (*Manifests, error) {
			return ReadManifests([]string{"-"}, Options{Stdin: bytes.NewReader(data), Replicas: 2})
		}
		m, err := read()
		if err != nil {
			var ps Problems
			if !errors.As(err, &ps) || len(ps) == 0 || m != nil {
				t.Fatalf("error %#v with %v", err, m)
			}
			for _, p := range ps {
				if p.Text == "" || p.Line < 0 || p.Line > bytes.Count(data, []byte("\n"))+1 {
					t.Errorf("problem %+v of %d lines", p, bytes.Count(data, []byte("\n"))+1)
				}
			}
			return
		}
		if err := consistent(m); err != nil {
			t.Error(err)
		}
		if a, b := summary(m, nil), summary(read()); a != b {
			t.Errorf("read twice:\n%s\n%s", a, b)
		}
	})
}
