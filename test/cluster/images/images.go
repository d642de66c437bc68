// Package images writes container images of static binaries, without a registry, a daemon or a Dockerfile, and the same bytes each time.
package images

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// The images of every cluster. Names are fully qualified: containerd takes any other for one of Docker's registry.
const (
	Pause   = "localhost/pause:pinned"
	CoreDNS = "localhost/coredns:pinned"
	// Agnhost is called as the upstream end-to-end tests of Kubernetes 1.36 call it, and has what NetworkPolicy tests use: the binary alone.
	Agnhost = "registry.k8s.io/e2e-test-images/agnhost:2.63.0"
)

// Image is one layer with some files in it.
type Image struct {
	Name       string
	Files      map[string]string // in the image, absolute: on this machine
	Entrypoint []string
	Args       []string
	User       string // "uid" or "uid:gid"; empty: root
}

// Write writes the image as `docker save` would: `docker load`, `podman load` and `ctr images import` read it.
func (i Image) Write(path string) error {
	if err := i.write(path); err != nil {
		return fmt.Errorf("image %s: %w", i.Name, err)
	}
	return nil
}

func (i Image) write(path string) (err error) {
	tag, err := name.NewTag(i.Name, name.StrictValidation)
	if err != nil {
		return err
	}
	files, err := layer(i.Files)
	if err != nil {
		return err
	}
	content, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files)), nil },
		tarball.WithCompressionLevel(0)) // it is read once, on this machine
	if err != nil {
		return err
	}
	image, err := mutate.AppendLayers(empty.Image, content)
	if err != nil {
		return err
	}
	configuration, err := image.ConfigFile()
	if err != nil {
		return err
	}
	configuration = configuration.DeepCopy()
	configuration.OS, configuration.Architecture = "linux", runtime.GOARCH
	configuration.Config = v1.Config{Entrypoint: i.Entrypoint, Cmd: i.Args, User: i.User}
	if image, err = mutate.ConfigFile(image, configuration); err != nil {
		return err
	}
	// In place at once: who finds the file finds all of it.
	if err := tarball.WriteToFile(path+".new", tag, image); err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	return os.Rename(path+".new", path)
}
