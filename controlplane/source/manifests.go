package source

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
)

// InjectScope says whose pods get a sidecar.
type InjectScope int

const (
	// InjectLabeled gives a sidecar to the pods of namespaces whose label policy.InjectLabel is enabled or required.
	InjectLabeled InjectScope = iota
	// InjectAll gives one to the pods of every namespace.
	InjectAll
)

// Options of [ReadManifests]. The zero value is usable.
type Options struct {
	// Replicas is the number of pods made for a Deployment, ReplicaSet or StatefulSet that has none in the input; 0 means 1.
	Replicas int
	// Inject says which namespaces get sidecars. A pod's own annotation policy.InjectLabel, "true" or "false", goes first.
	Inject InjectScope
	// Namespace is where objects go that name none; empty means "default".
	Namespace string
	// Stdin is read for the path "-"; nil means os.Stdin.
	Stdin io.Reader
	// Previous is an earlier reading of the same manifests: what is still there keeps the address that it was given then.
	Previous *Manifests
}

// Manifests are the objects of a cluster in which everything that was read is running.
type Manifests struct {
	// Objects are complete and sorted by namespace and name: pods have addresses and run on nodes, Services have their
	// cluster IPs, Services with a selector have EndpointSlices, and every namespace that is mentioned exists.
	Objects policy.Objects
	// PodNetwork and ServiceNetwork hold the address of every pod and every Service: the ranges from which addresses are
	// drawn, and host prefixes for the addresses outside of them that the manifests gave.
	PodNetwork, ServiceNetwork []netip.Prefix
	// NodeIPs are the addresses of the one machine that all nodes are, IPv4 first.
	NodeIPs []netip.Addr
	// Ignored counts what was not read, by "apiVersion/Kind", or by file name for documents that are no Kubernetes objects.
	Ignored map[string]int
	// Warnings are things that a person should know; the input is usable all the same.
	Warnings []string
}

// ReadManifests reads files, folders with everything below them, and stdin ("-"). If anything is wrong the error is a [Problems],
// and there are no Manifests.
func ReadManifests(paths []string, o Options) (*Manifests, error) {
	r := newReader(o)
	r.readAll(paths)
	if len(r.problems) == 0 { // else half of the objects are missing, and what follows would complain about that
		r.complete()
	}
	if len(r.problems) == 0 && len(r.pods) == 0 {
		r.problem(Problem{Text: "no pods in " + strings.Join(paths, ", "),
			Hint: "name manifests with a Pod, Deployment, StatefulSet, DaemonSet, ReplicaSet, Job or CronJob" + because(r.warnings)})
	}
	if len(r.problems) > 0 {
		return nil, r.problems.sorted()
	}
	return r.manifests(), nil
}

func because(warnings []string) string {
	if len(warnings) == 0 {
		return ""
	}
	return " (" + strings.Join(warnings, "; ") + ")"
}

// reader is one run of ReadManifests.
type reader struct {
	o        Options
	problems Problems
	warnings []string
	ignored  map[string]int

	objects
	origin  map[metav1.Object]*item // where an object was written
	first   map[string]*item        // "Kind/namespace/name" → the item that has it
	twins   map[string]int          // content of objects with generateName → how many were named
	unknown map[string]int          // "Kind: field" of exports from newer clusters → count
	leftOut map[string]bool         // "namespace/name" of pods that exist and take no part

	podNetwork, serviceNetwork *network
}

func newReader(o Options) *reader {
	if o.Replicas < 1 {
		o.Replicas = 1
	}
	if o.Namespace == "" {
		o.Namespace = metav1.NamespaceDefault
	}
	if o.Stdin == nil {
		o.Stdin = os.Stdin
	}
	return &reader{o: o, ignored: map[string]int{}, origin: map[metav1.Object]*item{}, first: map[string]*item{}, twins: map[string]int{},
		unknown: map[string]int{}, leftOut: map[string]bool{}}
}

func (r *reader) problem(p Problem) { r.problems = append(r.problems, p) }

// wrong reports a problem of an object that was read.
func (r *reader) wrong(o metav1.Object, field, text, hint string) {
	r.problem(r.origin[o].at(field, text, hint))
}

func (r *reader) warn(format string, args ...any) {
	r.warnings = append(r.warnings, fmt.Sprintf(format, args...))
}

// readAll makes typed, checked objects of the input, each by itself.
func (r *reader) readAll(paths []string) {
	f := finder{stdin: r.o.Stdin, seen: map[string]bool{}}
	for _, p := range paths {
		f.add(p)
	}
	r.problems = append(r.problems, f.problems...)
	for _, file := range f.files {
		for _, doc := range split(file) {
			items, problems := doc.values()
			r.problems = append(r.problems, problems...)
			for _, it := range items {
				r.take(it, listDepth)
			}
		}
	}
	r.sort()
}

// complete adds what a cluster would have added.
func (r *reader) complete() {
	r.makePods()
	r.leaveOut()
	r.makeNamespaces()
	r.assignAddresses()
	r.runPods()
	r.inject()
	r.makeEndpointSlices()
	r.makeNodes()
	r.sort()
	r.noteServices()
	r.noteKinds()
}

func (r *reader) manifests() *Manifests {
	return &Manifests{
		Objects: policy.Objects{
			Namespaces: r.namespaces, Nodes: r.nodes, Pods: r.pods, Services: r.services,
			EndpointSlices: r.slices, NetworkPolicies: r.policies,
		},
		PodNetwork: r.podNetwork.prefixes(), ServiceNetwork: r.serviceNetwork.prefixes(),
		NodeIPs: slices.Clone(nodeIPs),
		Ignored: r.ignored, Warnings: r.warnings,
	}
}
