package binaries

import (
	"fmt"
	"slices"
	"strings"
)

// pin is one binary: a main package (or a test) of the module graph that go.mod and go.sum in a directory beside this file fix.
type pin struct {
	name    string
	module  string // directory with go.mod
	pkg     string
	tags    string
	compile compiler
	test    string // not "": what is built is the package's test binary, and this is why
	stamp   string // not "": the module whose version Kubernetes' own version variables get
}

// compiler says whether a C compiler is needed.
type compiler int

const (
	pureGo compiler = iota
	withC
	withSeccomp // with C, and with libseccomp where it is installed
)

const kubernetes = "k8s.io/kubernetes"

var pins = []pin{
	{name: "etcd", module: "kubernetes", pkg: "go.etcd.io/etcd/server/v3"},
	{name: "kube-apiserver", module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-apiserver", stamp: kubernetes},
	{name: "kube-controller-manager", module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-controller-manager", stamp: kubernetes},
	{name: "kube-scheduler", module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-scheduler", stamp: kubernetes},
	{name: "kubelet", module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kubelet", stamp: kubernetes},
	{name: "kube-proxy", module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kube-proxy", stamp: kubernetes},
	{name: "kubectl", module: "kubernetes", pkg: "k8s.io/kubernetes/cmd/kubectl", stamp: kubernetes},
	{name: "agnhost", module: "kubernetes", pkg: "k8s.io/kubernetes/test/images/agnhost", stamp: kubernetes},
	{name: "e2e.test", module: "kubernetes", pkg: "k8s.io/kubernetes/test/e2e", test: "the suite is a test", stamp: kubernetes},
	{name: "containerd", module: "containerd", pkg: "github.com/containerd/containerd/v2/cmd/containerd", tags: "no_btrfs,no_devmapper,no_zfs"},
	{name: "containerd-shim-runc-v2", module: "containerd", pkg: "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"},
	{name: "ctr", module: "containerd", pkg: "github.com/containerd/containerd/v2/cmd/ctr"},
	{name: "runc", module: "runc", pkg: "github.com/opencontainers/runc", compile: withSeccomp}, // joins namespaces in C, before Go's threads
	{name: "bridge", module: "cni", pkg: "github.com/containernetworking/plugins/plugins/main/bridge"},
	{name: "loopback", module: "cni", pkg: "github.com/containernetworking/plugins/plugins/main/loopback"},
	{name: "host-local", module: "cni", pkg: "github.com/containernetworking/plugins/plugins/ipam/host-local"},
	{name: "portmap", module: "cni", pkg: "github.com/containernetworking/plugins/plugins/meta/portmap"},
	{name: "coredns", module: "coredns", pkg: "."},
	{name: "pause", module: "pause", pkg: "."},
	{name: "node", module: "node", pkg: "."},
}

// Names lists the binaries that Path knows, in the order in which a cluster needs them.
func Names() []string {
	var out []string
	for _, p := range pins {
		out = append(out, p.name)
	}
	return out
}

func find(name string) (pin, error) {
	i := slices.IndexFunc(pins, func(p pin) bool { return p.name == name })
	if i < 0 {
		return pin{}, fmt.Errorf("binary %q is not pinned; those that are: %s", name, strings.Join(Names(), ", "))
	}
	return pins[i], nil
}

// arguments are those of the go command, without -o. The version is that of the stamped module.
func (p pin) arguments(version string) []string {
	args := []string{"build"}
	if p.test != "" {
		args = []string{"test", "-c"}
	}
	args = append(args, "-trimpath", "-buildvcs=false")
	if p.tags != "" {
		args = append(args, "-tags="+p.tags)
	}
	link := "-s -w"
	if p.stamp != "" {
		// "v1.36.3": where Kubernetes' own build writes the version, and where its libraries look for it.
		parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
		for _, at := range []string{"k8s.io/component-base/version", "k8s.io/client-go/pkg/version"} {
			link += fmt.Sprintf(" -X %s.gitVersion=%s -X %s.gitMajor=%s -X %s.gitMinor=%s", at, version, at, parts[0], at, parts[1])
		}
	}
	return append(args, "-ldflags="+link, p.pkg)
}
