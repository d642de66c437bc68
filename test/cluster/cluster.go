package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/mantlet/mantlet/test/cluster/binaries"
)

// Cluster is one that runs.
type Cluster struct {
	directory string
	authority *authority
	paths     map[string]string // of binaries
	log       *slog.Logger

	mu    sync.Mutex // of state and its file
	state state
}

// Binaries names those that a cluster is made of; package binaries builds them.
func Binaries() []string { return slices.Clone(needed) }

var needed = []string{
	"etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl",
	"containerd", "containerd-shim-runc-v2", "ctr", "runc", "bridge", "loopback", "host-local", "portmap", "coredns", "pause", "agnhost", "node",
}

// Up makes a cluster and returns when its nodes and its DNS are ready: about ten seconds, once the binaries are built. If it fails nothing is
// left but the directory, with the logs.
func Up(ctx context.Context, o Options) (_ *Cluster, err error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	o.Nodes = max(1, o.Nodes)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if err := sweepCgroups(); err != nil {
		return nil, err
	}
	c := &Cluster{log: o.Log, paths: map[string]string{}}
	if c.directory, err = filepath.Abs(o.Directory); err != nil {
		return nil, err
	}
	if err := c.findBinaries(ctx); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.logs(), 0o755); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.end())
		}
	}()
	if c.state.Control, err = startMachine(c.paths["node"], "control", c.of("control"), o.Life); err != nil {
		return nil, err
	}
	if err := c.save(); err != nil {
		return nil, err
	}
	if c.state.Network, err = claim(o.Family, c.state.Control); err != nil {
		return nil, err
	}
	if err := errors.Join(c.save(), c.issue()); err != nil {
		return nil, err
	}
	all, sub := errgroup.WithContext(ctx)
	served := make(chan struct{})
	all.Go(func() error {
		if err := c.startControlPlane(sub, o); err != nil {
			return err
		}
		close(served)
		return c.startControllers()
	})
	all.Go(func() error {
		images, err := c.writeImages()
		if err != nil {
			return err
		}
		for i := range o.Nodes {
			all.Go(func() error { return c.startNode(sub, i, slices.Concat(images, o.Images), o.Life, served) })
		}
		return nil
	})
	if err := all.Wait(); err != nil {
		return nil, err
	}
	return c, c.startDNS(ctx)
}

// Open finds a running cluster by its directory, from within Mantlet's source tree.
func Open(ctx context.Context, directory string, log *slog.Logger) (*Cluster, error) {
	directory, err := filepath.Abs(directory)
	if err != nil {
		return nil, err
	}
	c := &Cluster{directory: directory, log: log, paths: map[string]string{}}
	c.state, err = readState(directory)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no cluster in %s\n  hint: cluster up", directory)
	}
	if err != nil {
		return nil, err
	}
	c.authority = &authority{directory: c.of("pki"), server: c.server()}
	if err := c.authority.load(); err != nil {
		return nil, err
	}
	return c, c.findBinaries(ctx)
}

func (c *Cluster) findBinaries(ctx context.Context) error {
	for _, name := range needed {
		path, err := binaries.Path(ctx, c.log, name)
		if err != nil {
			return err
		}
		c.paths[name] = path
	}
	return nil
}

// of is a file of the cluster's directory.
func (c *Cluster) of(file string) string { return filepath.Join(c.directory, file) }

func (c *Cluster) logs() string { return c.of("logs") }

func (c *Cluster) server() string {
	return "https://" + netip.AddrPortFrom(c.state.Network.addresses(controlHost)[0], apiPort).String()
}

// save writes the state down, so that others find what runs.
func (c *Cluster) save() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.write(c.directory)
}

// run starts one of the cluster's programs on a machine; its log is MACHINE-NAME.log.
func (c *Cluster) run(m *Machine, name string, args ...string) error {
	c.mu.Lock()
	err := m.start(name, filepath.Join(c.logs(), m.Name+"-"+name+".log"), append([]string{c.paths[name]}, args...)...)
	c.mu.Unlock()
	return errors.Join(err, c.save())
}

// await waits as long as the cluster's program runs; what it says last is in the error.
func (c *Cluster) await(ctx context.Context, m *Machine, name string, ready func(context.Context) error) error {
	c.mu.Lock()
	task := m.Tasks[name]
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	err := await(ctx, nil, func(ctx context.Context) error {
		err := ready(ctx)
		if err != nil && !task.alive() {
			cancel()
			return fmt.Errorf("it has ended (%w)", err)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s on %s is not ready: %w; the end of %s:\n%s", name, m.Name, err, task.Log, tail(task.Log))
	}
	return nil
}

// Kubeconfig is the path of a kubeconfig whose user may do everything. It works on this machine, and on the cluster's.
func (c *Cluster) Kubeconfig() string { return c.authority.path(admin.file + ".conf") }

// Kubectl runs the cluster's kubectl and returns what it writes, without the space around it. Stdin may be empty.
func (c *Cluster) Kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, c.paths["kubectl"], append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...)
	cmd.Stdin = strings.NewReader(stdin)
	var out, complaint strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s%s", strings.Join(args, " "), err, strings.TrimSpace(complaint.String()), strings.TrimSpace(out.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

// Nodes are the machines that are nodes, in the order of their names. "control" is none.
func (c *Cluster) Nodes() []*Machine { return c.state.Nodes }

// Machine is a node, or "control".
func (c *Cluster) Machine(name string) (*Machine, error) {
	var names []string
	for _, m := range append([]*Machine{c.state.Control}, c.state.Nodes...) {
		if m.Name == name {
			return m, nil
		}
		names = append(names, m.Name)
	}
	return nil, fmt.Errorf("no machine %q in this cluster; there are %s", name, strings.Join(names, ", "))
}

// PodNetworks are the prefixes of all pods' addresses, IPv4 first.
func (c *Cluster) PodNetworks() []netip.Prefix { return c.state.Network.pods() }

// ServiceNetworks are the prefixes of cluster IPs, IPv4 first.
func (c *Cluster) ServiceNetworks() []netip.Prefix { return c.state.Network.services() }

// Outside are this machine's addresses in the nodes' network, IPv4 first: pods reach what listens there, and it is not of the cluster.
func (c *Cluster) Outside() []netip.Addr { return c.state.Network.addresses(outsideHost) }

// Down ends the cluster, and removes its directory. It takes what is left of a cluster, too.
func (c *Cluster) Down() error {
	if err := c.end(); err != nil {
		return err
	}
	return os.RemoveAll(c.directory)
}

// end kills the machines. The kernel ends with them all that ran, was mounted and was linked there; what is left are cgroups, which the host
// knows. The control plane's machine goes last: as long as it lives, the link to the host is this cluster's.
func (c *Cluster) end() error {
	var all errgroup.Group
	for _, m := range c.state.Nodes {
		all.Go(func() error { return errors.Join(m.Init.kill(), removeCgroups(m.Cgroup())) })
	}
	errs := []error{all.Wait()}
	if control := c.state.Control; control != nil {
		if c.state.Network != nil && control.Init.alive() {
			errs = append(errs, c.state.Network.release())
		}
		errs = append(errs, control.Init.kill())
	}
	return errors.Join(errs...)
}
