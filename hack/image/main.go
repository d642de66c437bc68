// Command image writes Mantlet's container image as a tar of an OCI image layout, with no registry and no daemon: both binaries, Envoy, and
// the shared libraries that Envoy needs, which are this machine's.
//
//	ctr images import IMAGE.tar        docker load -i IMAGE.tar        skopeo copy oci-archive:IMAGE.tar docker://…
//
// The same files make the same bytes.
package main

import (
	"archive/tar"
	"cmp"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	c := contents{}
	var out, name string
	flag.StringVar(&out, "o", "dist/mantlet.tar", "the tar to write")
	flag.StringVar(&name, "name", "localhost/mantlet:dev", "the image's name, fully qualified, with its tag")
	flag.StringVar(&c.bin, "bin", "bin", "folder with mantlet and mantlet-agent, static")
	flag.StringVar(&c.envoy, "envoy", ".cache/envoy/envoy", "the Envoy binary")
	flag.Parse()
	digest, size, err := write(c, name, out)
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
	fmt.Fprintf(os.Stdout, "%s  %s  %d MiB\n%s@%s\n", out, name, size>>20, strings.TrimSuffix(name, ":"+tag(name)), digest)
}

// contents are the files that an image is made of.
type contents struct{ bin, envoy string }

const binaries = "/usr/local/bin"

// programs are Mantlet's, from the folder bin.
var programs = []string{"mantlet", "mantlet-agent"}

// image has two layers: Envoy and its libraries change seldom.
func (c contents) image() (v1.Image, error) {
	base, own := tree{}, tree{}
	for _, name := range programs {
		file := filepath.Join(c.bin, name)
		if libs, err := libraries(file); err != nil || len(libs) > 0 {
			return nil, cmp.Or(err, fmt.Errorf("%s is not static; build it with CGO_ENABLED=0 (make build)", file))
		}
		text, err := readFile(file)
		if err != nil {
			return nil, err
		}
		own.add(binaries+"/"+name, 0o755, text)
	}
	for _, dir := range []string{"etc", "tmp", "var/run", "etc/mantlet", "proc", "sys", "dev"} {
		base.folder(dir)
	}
	base["tmp"] = entry{mode: 0o1777}
	// Envoy, and in node mode the agent, are users that have no name: another one in each pod.
	const users = "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:control plane:/:/sbin/nologin\n"
	base.add("etc/passwd", 0o644, []byte(users))
	base.add("etc/group", 0o644, []byte("root:x:0:\nnonroot:x:65532:\n"))
	base.add("etc/nsswitch.conf", 0o644, []byte("hosts: files dns\n"))
	libs, err := libraries(c.envoy)
	if err != nil {
		return nil, err
	}
	libs[binaries+"/envoy"] = c.envoy
	for at, file := range libs {
		text, err := readFile(file)
		if err != nil {
			return nil, err
		}
		base.add(at, 0o755, text)
	}
	var layers []mutate.Addendum
	for i, t := range []tree{base, own} {
		l, err := t.layer()
		if err != nil {
			return nil, err
		}
		layers = append(layers, mutate.Addendum{Layer: l, History: v1.History{CreatedBy: []string{"Envoy and its libraries", "Mantlet"}[i]}})
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	if img, err = mutate.Append(img, layers...); err != nil {
		return nil, err
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.OS, cfg.Architecture, cfg.Config = "linux", runtime.GOARCH, config()
	return mutate.ConfigFile(img, cfg)
}

// config is how the image runs; the Dockerfile says the same.
func config() v1.Config {
	return v1.Config{User: "65532:65532", Entrypoint: []string{binaries + "/mantlet"}, Env: []string{"PATH=" + binaries}, WorkingDir: "/"}
}

func tag(name string) string {
	_, tag, _ := strings.Cut(name[strings.LastIndexByte(name, '/')+1:], ":")
	return tag
}

// write makes the image and packs its layout.
func write(c contents, name, out string) (digest v1.Hash, size int64, err error) {
	if tag(name) == "" {
		return digest, 0, fmt.Errorf("name %q has no tag", name)
	}
	img, err := c.image()
	if err != nil {
		return digest, 0, err
	}
	if digest, err = img.Digest(); err != nil {
		return digest, 0, err
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return digest, 0, err
	}
	dir, err := os.MkdirTemp(filepath.Dir(out), ".image-")
	if err != nil {
		return digest, 0, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	path, err := layout.Write(filepath.Join(dir, "layout"), empty.Index)
	if err != nil {
		return digest, 0, err
	}
	err = path.AppendImage(img, layout.WithAnnotations(map[string]string{
		"org.opencontainers.image.ref.name": tag(name),
		"io.containerd.image.name":          name,
	}), layout.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
	if err != nil {
		return digest, 0, err
	}
	packed := filepath.Join(dir, "image.tar")
	if size, err = pack(string(path), packed); err != nil {
		return digest, 0, err
	}
	return digest, size, os.Rename(packed, out) // whole, or not at all
}

// pack writes a folder as a tar, sorted and without times.
func pack(dir, out string) (size int64, err error) {
	f, err := os.Create(out)
	if err != nil {
		return 0, err
	}
	defer func() { err = cmp.Or(err, f.Close()) }()
	w := tar.NewWriter(f)
	err = filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: filepath.ToSlash(name), Mode: 0o644, Size: info.Size(), Format: tar.FormatPAX}); err != nil {
			return err
		}
		in, err := os.Open(p)
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.Copy(w, in)
		return err
	})
	if err != nil {
		return 0, err
	}
	if err := w.Close(); err != nil {
		return 0, err
	}
	return f.Seek(0, io.SeekCurrent)
}
