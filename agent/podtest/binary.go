package podtest

import (
	"os"
	"path/filepath"
	"testing"
)

// Envoy is the binary that the tests run: $MANTLET_ENVOY, else what `make envoy` fetched. Without one the test fails.
func Envoy(t testing.TB) string {
	t.Helper()
	path := os.Getenv("MANTLET_ENVOY")
	if path == "" {
		path = filepath.Join(root(t), ".cache", "envoy", "envoy")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no envoy (%v); run: make envoy", err)
	}
	return path
}

// root is the folder of go.mod, above the folder that a package's tests run in.
func root(t testing.TB) string {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			t.Fatal("no go.mod above the test's folder")
		}
		dir = parent
	}
}

// Dir makes a folder with a path short enough for sockets, which any user may pass through. It goes away with the test.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pod")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
