package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/test/cluster/images"
)

// writeImages writes the archives of what every cluster has, and returns their paths.
func (c *Cluster) writeImages() ([]string, error) {
	if err := os.MkdirAll(c.of("images"), 0o755); err != nil {
		return nil, err
	}
	var out []string
	for _, i := range []struct {
		file  string
		image images.Image
	}{
		{"pause", images.Image{Name: images.Pause, Files: map[string]string{"/pause": c.paths["pause"]}, Entrypoint: []string{"/pause"}}},
		{"coredns", images.Image{Name: images.CoreDNS, Files: map[string]string{"/coredns": c.paths["coredns"]}, Entrypoint: []string{"/coredns"}}},
		{"agnhost", images.Image{
			Name: images.Agnhost, Files: map[string]string{"/agnhost": c.paths["agnhost"]}, Entrypoint: []string{"/agnhost"}, Args: []string{"pause"},
		}},
	} {
		path := c.of(filepath.Join("images", i.file+".tar"))
		if err := i.image.Write(path); err != nil {
			return nil, err
		}
		out = append(out, path)
	}
	return out, nil
}

// LoadImage brings an archive, as docker save or an OCI layout in a tar file, to all nodes. A pod that names an image so needs imagePullPolicy
// Never or IfNotPresent.
func (c *Cluster) LoadImage(ctx context.Context, archive string) error {
	archive, err := filepath.Abs(archive)
	if err != nil {
		return err
	}
	if _, err := os.Stat(archive); err != nil {
		return fmt.Errorf("load image: %w", err)
	}
	all, ctx := errgroup.WithContext(ctx)
	for _, node := range c.state.Nodes {
		all.Go(func() error { return c.importImage(ctx, node, archive) })
	}
	return all.Wait()
}

// importImage gives ctr the archive as its standard input: nodes do not see all of the host's directories.
func (c *Cluster) importImage(ctx context.Context, node *Machine, archive string) error {
	file, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := c.ctr(ctx, node, file, "images", "import", "-"); err != nil {
		return fmt.Errorf("load image %s: %w", archive, err)
	}
	return nil
}
