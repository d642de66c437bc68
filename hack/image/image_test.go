package main

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

func envoyBinary(t *testing.T) string {
	t.Helper()
	for _, p := range []string{os.Getenv("MANTLET_ENVOY"), "../../.cache/envoy/envoy"} {
		if p == "" {
			continue
		}
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	t.Fatal("no Envoy: make envoy fetches it")
	return ""
}

// testContents builds what goes in, and this command: with the race detector it would compress for minutes.
func testContents(t *testing.T) (c contents, tool string) {
	t.Helper()
	c = contents{bin: t.TempDir(), envoy: envoyBinary(t)}
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-o", c.bin+"/", "../../cmd/mantlet", "../../cmd/mantlet-agent", ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return c, filepath.Join(c.bin, "image")
}

func makeImage(t *testing.T, tool string, c contents, out string) v1.Hash {
	t.Helper()
	text, err := exec.CommandContext(t.Context(), tool, "-bin", c.bin, "-envoy", c.envoy, "-name", "localhost/mantlet:test", "-o", out).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	_, after, _ := strings.Cut(strings.TrimSpace(string(text)), "@")
	digest, err := v1.NewHash(after)
	if err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return digest
}

// The same files make the same bytes, at another time and in another place; and all three programs run with nothing but what is in the
// image.
func TestImage(t *testing.T) {
	c, tool := testContents(t)
	first, second := filepath.Join(t.TempDir(), "a.tar"), filepath.Join(t.TempDir(), "b.tar")
	digest := makeImage(t, tool, c, first)
	later := time.Now().Add(time.Hour)
	if err := os.Chtimes(filepath.Join(c.bin, "mantlet"), later, later); err != nil {
		t.Fatal(err)
	}
	if again := makeImage(t, tool, c, second); digest != again || read(t, first) != read(t, second) {
		t.Errorf("two runs differ: %s, %s", digest, again)
	}

	img := unpack(t, first, digest)
	cfg, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Config.User != "65532:65532" || cfg.Config.Entrypoint[0] != "/usr/local/bin/mantlet" {
		t.Errorf("configuration: %+v", cfg.Config)
	}
	root := t.TempDir()
	extract(t, img, root)
	for program, want := range map[string]string{"envoy --version": "version:", "mantlet version": "", "mantlet-agent version": ""} {
		args := strings.Fields(program)
		cmd := exec.CommandContext(t.Context(), "/usr/local/bin/"+args[0], args[1:]...)
		cmd.Env, cmd.Dir = []string{}, "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		if os.Geteuid() != 0 {
			cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
			cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
			cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
		}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v\n%s", program, err, out)
		}
	}
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// files writes the files and folders of a tar below a folder.
func files(t *testing.T, r io.Reader, below string) {
	t.Helper()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		at := filepath.Join(below, filepath.Clean("/"+h.Name))
		if h.Typeflag == tar.TypeDir {
			if err := os.MkdirAll(at, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(at, os.O_CREATE|os.O_EXCL|os.O_WRONLY, h.FileInfo().Mode().Perm())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(f, tr); err != nil { //nolint:gosec // an image that this test has made
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func unpack(t *testing.T, file string, digest v1.Hash) v1.Image {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	files(t, f, dir)
	path, err := layout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	index, err := path.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil || len(manifest.Manifests) != 1 || manifest.Manifests[0].Digest != digest || manifest.Manifests[0].Annotations["io.containerd.image.name"] != "localhost/mantlet:test" {
		t.Fatalf("index: %+v (%v)", manifest, err)
	}
	img, err := path.Image(digest)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func extract(t *testing.T, img v1.Image, root string) {
	t.Helper()
	r := mutate.Extract(img)
	defer r.Close()
	files(t, r, root)
}

func TestNotStatic(t *testing.T) {
	c := contents{bin: t.TempDir(), envoy: envoyBinary(t)}
	for _, name := range []string{"mantlet", "mantlet-agent"} {
		text := read(t, c.envoy)
		if err := os.WriteFile(filepath.Join(c.bin, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.image(); err == nil || !strings.Contains(err.Error(), "is not static") {
		t.Errorf("got %v", err)
	}
}
