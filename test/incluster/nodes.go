package incluster

import (
	"context"
	"os"
	"path/filepath"

	"github.com/mantlet/mantlet/test/cluster"
)

// Where the nodes have what a container runtime looks for.
const (
	cniConfigurations = "etc/cni/net.d"
	cniBinaries       = "opt/cni/bin"
)

// folder is what is in one, by name; hidden files too.
type folder map[string]string

func readFolder(path string) (folder, error) {
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	f := folder{}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(path, e.Name()))
		if err != nil {
			return nil, err
		}
		f[e.Name()] = string(text)
	}
	return f, nil
}

// networks reads the CNI configurations of all nodes, by node.
func (w *World) networks() (map[string]folder, error) {
	all := map[string]folder{}
	for _, node := range w.Cluster.Nodes() {
		f, err := networkOf(node)
		if err != nil {
			return nil, err
		}
		all[node.Name] = f
	}
	return all, nil
}

func networkOf(node *cluster.Machine) (folder, error) {
	return readFolder(filepath.Join(node.Root(), cniConfigurations))
}

// LoadNext brings the image Next to the nodes: the next version of Mantlet, as far as nodes can tell.
func (w *World) LoadNext(ctx context.Context) error {
	archive, err := next(ctx, w.parts)
	if err != nil {
		return err
	}
	return w.Cluster.LoadImage(ctx, archive)
}
