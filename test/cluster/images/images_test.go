package images

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// The same files give the same bytes, whenever and wherever they lie, and the image has what was asked for.
func TestWrite(t *testing.T) {
	directory := t.TempDir()
	var archives [2][]byte
	for i := range archives {
		from, to := filepath.Join(directory, "program"+strings.Repeat("x", i)), filepath.Join(directory, "image.tar")
		if err := os.WriteFile(from, []byte("#!"), os.FileMode(0o600+0o100*i)); err != nil {
			t.Fatal(err)
		}
		image := Image{
			Name: "localhost/x:1", Files: map[string]string{"/usr/bin/x": from, "/usr/lib/y": from, "/z": from},
			Entrypoint: []string{"/usr/bin/x"}, Args: []string{"-a"}, User: "1337",
		}
		if err := image.Write(to); err != nil {
			t.Fatal(err)
		}
		var err error
		if archives[i], err = os.ReadFile(to); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("two archives of the same files differ")
	}
	tag, err := name.NewTag("localhost/x:1")
	if err != nil {
		t.Fatal(err)
	}
	image, err := tarball.ImageFromPath(filepath.Join(directory, "image.tar"), &tag)
	if err != nil {
		t.Fatal(err)
	}
	configuration, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if got := configuration.Config; got.Entrypoint[0] != "/usr/bin/x" || got.Cmd[0] != "-a" || got.User != "1337" || configuration.OS != "linux" {
		t.Errorf("configuration: %+v", configuration)
	}
	files := mutate.Extract(image)
	defer files.Close()
	var names []string
	for r := tar.NewReader(files); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.FileInfo().Mode().String()+" "+h.Name)
	}
	want := "dtrwxrwxrwx tmp/, drwxr-xr-x usr/, drwxr-xr-x usr/bin/, -rwxr-xr-x usr/bin/x, drwxr-xr-x usr/lib/, -rwxr-xr-x usr/lib/y, -rwxr-xr-x z"
	if got := strings.ReplaceAll(strings.Join(names, ", "), "//", "/"); strings.ReplaceAll(got, "/,", ",") != strings.ReplaceAll(want, "/,", ",") {
		t.Errorf("files:\ngot  %s\nwant %s", got, want)
	}
}

func TestWriteFails(t *testing.T) {
	to := filepath.Join(t.TempDir(), "image.tar")
	for _, c := range []struct {
		image Image
		want  string
	}{
		{Image{Name: "x"}, "image x: "},
		{Image{Name: "localhost/x:1", Files: map[string]string{"/x": to + ".missing"}}, "no such file"},
	} {
		if err := c.image.Write(to); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %s", err, c.want)
		}
		if left, _ := filepath.Glob(to + "*"); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	}
}
