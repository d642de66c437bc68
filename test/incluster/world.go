package incluster

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// World is a cluster with Mantlet in it.
type World struct {
	Cluster *cluster.Cluster
	Client  kubernetes.Interface
	API     *rest.Config
	Capture inject.Capture

	parts, mantlet string            // where what was built is, and the program
	values         []string          // for `mantlet install --set`
	before         map[string]folder // by node, the folder of CNI configurations before Mantlet was installed
}

// Options say what Up makes.
type Options struct {
	// Directory gets what is built, and the cluster's state: about 2 GB. It must not exist, or be empty.
	Directory string
	// Capture is the mode in which Mantlet is installed; "" is inject.CaptureSidecar.
	Capture inject.Capture
	Log     *slog.Logger
}

// nodes of a World: where a pod is makes a difference for services, and nodes can be drained.
const nodes = 2

// Up builds Mantlet as it is shipped, makes a cluster and installs it there. The cluster ends with the process, at the latest.
func Up(ctx context.Context, o Options) (_ *World, err error) {
	parts := filepath.Join(o.Directory, "build")
	archives, err := build(ctx, parts)
	if err != nil {
		return nil, err
	}
	w := &World{parts: parts, mantlet: filepath.Join(parts, "mantlet"), Capture: cmp.Or(o.Capture, inject.CaptureSidecar)}
	w.values = []string{"image=" + Image, "capture=" + string(w.Capture)}
	w.Cluster, err = cluster.Up(ctx, cluster.Options{
		Directory: filepath.Join(o.Directory, "cluster"), Nodes: nodes, Family: cluster.DualStack, Images: archives, Life: cluster.WithProcess, Log: o.Log,
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Down())
		}
	}()
	if w.API, err = clientcmd.BuildConfigFromFlags("", w.Cluster.Kubeconfig()); err != nil {
		return nil, err
	}
	w.API.QPS, w.API.Burst = 200, 400
	if w.Client, err = kubernetes.NewForConfig(w.API); err != nil {
		return nil, err
	}
	if w.before, err = w.networks(); err != nil {
		return nil, err
	}
	return w, w.Install(ctx)
}

// Down ends the cluster. Directory is the caller's to remove.
func (w *World) Down() error { return w.Cluster.Down() }

// Install installs Mantlet as a user would, or changes what is installed: values go over those of the World. It waits until all of it is as it should be.
func (w *World) Install(ctx context.Context, values ...string) error {
	args := []string{"install"}
	for _, v := range slices.Concat(w.values, values) {
		args = append(args, "--set", v)
	}
	manifests, err := w.Mantlet(ctx, args...)
	if err != nil {
		return err
	}
	if _, err := w.Cluster.Kubectl(ctx, manifests.Out, "apply", "--server-side", "-f", "-"); err != nil {
		return err
	}
	if err := w.AwaitControlPlane(ctx); err != nil || w.Capture != inject.CaptureNode {
		return err
	}
	return w.AwaitNodes(ctx)
}

// AwaitControlPlane waits until all replicas are what the Deployment asks for, and ready.
func (w *World) AwaitControlPlane(ctx context.Context) error {
	return w.await(ctx, "deployment/"+names.Service)
}

// AwaitNodes waits until each node's daemon is what the DaemonSet asks for, and ready.
func (w *World) AwaitNodes(ctx context.Context) error { return w.await(ctx, daemonSet) }

// daemonSet is node mode's.
const daemonSet = "daemonset/mantlet-node"

func (w *World) await(ctx context.Context, workload string) error {
	_, err := w.Cluster.Kubectl(ctx, "", "-n", names.SystemNamespace, "rollout", "status", workload, "--timeout=180s")
	if err != nil {
		logs, _ := w.Cluster.Kubectl(ctx, "", "-n", names.SystemNamespace, "logs", workload, "--tail=20")
		return fmt.Errorf("%s is not ready: %w\n%s", workload, err, logs)
	}
	return nil
}

// Output is what a program wrote and its exit code.
type Output struct {
	Out, Err string
	Code     int
}

// Mantlet runs the command mantlet as a user would, with the cluster's kubeconfig. An exit code other than 0 is an error, and in the Output too.
func (w *World) Mantlet(ctx context.Context, args ...string) (o Output, err error) {
	cmd := exec.CommandContext(ctx, w.mantlet, args...)
	cmd.Env = append(cmd.Environ(), "KUBECONFIG="+w.Cluster.Kubeconfig())
	var out, complaint strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &complaint
	err = cmd.Run()
	o = Output{Out: out.String(), Err: complaint.String(), Code: cmd.ProcessState.ExitCode()}
	if err != nil {
		err = fmt.Errorf("mantlet %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(o.Err))
	}
	return o, err
}

// Status is what `mantlet status -o json` says.
func (w *World) Status(ctx context.Context) (s status.Status, err error) {
	o, err := w.Mantlet(ctx, "status", "-o", "json")
	if o.Out == "" { // where something is not in force it has an error, and says the status all the same
		return s, err
	}
	return s, json.Unmarshal([]byte(o.Out), &s)
}

// Try connects from a pod, "namespace/name", whose first container is Client, once to each address in turn.
func (w *World) Try(ctx context.Context, pod string, addresses ...string) ([]traffic.Attempt, error) {
	namespace, name, _ := strings.Cut(pod, "/")
	out, err := w.Cluster.Kubectl(ctx, "", slices.Concat([]string{"-n", namespace, "exec", name, "-c", "app", "--", "/traffic", "try"}, addresses)...)
	if err != nil {
		return nil, err
	}
	var all []traffic.Attempt
	for lines := json.NewDecoder(strings.NewReader(out)); len(all) < len(addresses); {
		var a traffic.Attempt
		if err := lines.Decode(&a); err != nil {
			return nil, fmt.Errorf("from %s to %q: %w: %q", pod, addresses, err, out)
		}
		all = append(all, a)
	}
	return all, nil
}

// Await looks again and again until f has no error; what it said last is in the error.
func Await(ctx context.Context, patience time.Duration, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %s: %w", patience, err)
		case <-again.C:
		}
	}
}

// together runs all side by side.
func together(all ...func() error) error {
	var g errgroup.Group
	for _, f := range all {
		g.Go(f)
	}
	return g.Wait()
}
