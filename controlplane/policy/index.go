package policy

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/gaissmai/bart"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/verdict"
)

// Config is what the semantics need to know beside the objects.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	// PodNetwork holds the ranges from which pods get their addresses.
	PodNetwork []netip.Prefix
	// ServiceNetwork holds the ranges from which Services get their cluster IPs. No datagram leaves for there that is not led to an
	// endpoint.
	ServiceNetwork []netip.Prefix
	// VolatileLabels are left out of identities; nil means identity.VolatileLabels.
	VolatileLabels []string
	// DefaultMode is the mode of namespaces without ModeLabel; zero means permissive.
	DefaultMode verdict.Mode
}

// Index holds the objects that decide, and the verdicts compiled from them. It is not safe for concurrent use: whoever feeds it owns it.
type Index struct {
	namer       *identity.Namer
	podNetwork  []netip.Prefix
	serviceNet  []netip.Prefix
	defaultMode verdict.Mode

	namespaces map[string]*namespace
	pods       map[string]*pod       // by "namespace/name"
	claims     map[netip.Addr][]*pod // who says that an address is its own; see owner
	identities map[spiffeid.ID]*ident
	subjects   map[string]*Subject
	services   services
	zones      map[string]string // by node; of those that are in one
	nodes      nodes
	hosts      hosts

	egressIsolated map[spiffeid.ID]bool // identities of which egress policy isolates some pods
	boundaries     *bart.Table[int]     // ipBlock edges inside the pod network, with a count of uses
	retired        retired              // identities that running pods had before
	bound          map[string]time.Time // namespaces whose identities count from their pods' addresses only, and until when; see Bind
	volatileKeys   map[string]int       // volatile labels that selectors mention, with a count of uses

	plain   map[string]*pod         // pods without a sidecar
	outside map[netip.Addr]struct{} // claimed addresses that are not in the pod network
	readers readers

	packets packetIndex
	reached map[question]*Reach // since the last change

	dirty    map[string]bool // keys of subjects to compile
	compiles int
}

// namespace is a namespace and what is in it. It exists also for objects whose Namespace object is not known (yet).
type namespace struct {
	name       string
	labels     map[string]string
	identities map[spiffeid.ID]*ident
	pods       map[string]*pod
	policies   map[string]*netpol
	sorted     []*netpol   // policies by key; nil: nobody has asked since they changed
	groups     set[*group] // that choose it
}

func (n *namespace) sortedPolicies() []*netpol {
	if n.sorted == nil && len(n.policies) > 0 {
		n.sorted = slices.Collect(maps.Values(n.policies))
		slices.SortFunc(n.sorted, func(a, b *netpol) int { return strings.Compare(a.key, b.key) })
	}
	return n.sorted
}

// NewIndex returns an empty Index.
func NewIndex(c Config) *Index {
	volatile := c.VolatileLabels
	if volatile == nil {
		volatile = identity.VolatileLabels()
	}
	if c.DefaultMode == 0 {
		c.DefaultMode = verdict.Permissive
	}
	network := slices.Clone(c.PodNetwork)
	slices.SortFunc(network, func(a, b netip.Prefix) int {
		if a.Bits() != b.Bits() {
			return a.Bits() - b.Bits()
		}
		return a.Addr().Compare(b.Addr())
	})
	return &Index{
		namer:          identity.NewNamer(c.TrustDomain, volatile),
		podNetwork:     network,
		serviceNet:     slices.Clone(c.ServiceNetwork),
		defaultMode:    c.DefaultMode,
		namespaces:     map[string]*namespace{},
		pods:           map[string]*pod{},
		claims:         map[netip.Addr][]*pod{},
		identities:     map[spiffeid.ID]*ident{},
		subjects:       map[string]*Subject{},
		services:       newServices(),
		zones:          map[string]string{},
		nodes:          newNodes(),
		hosts:          newHosts(),
		egressIsolated: map[spiffeid.ID]bool{},
		boundaries:     new(bart.Table[int]),
		retired:        retired{},
		bound:          map[string]time.Time{},
		volatileKeys:   map[string]int{},
		plain:          map[string]*pod{},
		outside:        map[netip.Addr]struct{}{},
		readers:        newReaders(),
		packets:        newPacketIndex(),
		reached:        map[question]*Reach{},
		dirty:          map[string]bool{},
	}
}

// Delta is what a change touched. All lists are sorted and without duplicates.
type Delta struct {
	// Subjects are the keys of subjects whose verdicts have to be compiled anew; some may turn out the same.
	Subjects []string
	// Pods ("namespace/name") came, went, or changed in anything that somebody else sees of them.
	Pods []string
	// Services ("namespace/name") came, went, or changed, their endpoints included.
	Services []string
	// Addrs came to be nodes' or services' addresses, or ceased to, or their service changed.
	Addrs []netip.Addr
	// NodePorts (of any protocol) came to be services', or ceased to, or their service changed.
	NodePorts []uint16
	// HostPorts came to be pods', or ceased to, or their pod changed, or their node has other addresses. Sorted by node, protocol and port.
	HostPorts []HostPort
	// External says that External lists others than before.
	External bool
	// Packets are the pods ("namespace/name") whose packet policy has to be compiled anew; some may turn out the same.
	Packets []string
	// Gone are the keys of subjects that no pod has any more.
	Gone []string
}

// Merge is what several changes in a row touched.
func Merge(deltas []Delta) Delta {
	c, external := newChange(), false
	for _, d := range deltas {
		for _, k := range d.Subjects {
			c.subjects[k] = true
		}
		for _, k := range d.Pods {
			c.pods[k] = true
		}
		for _, k := range d.Services {
			c.services[k] = true
		}
		for _, a := range d.Addrs {
			c.addrs[a] = true
		}
		for _, p := range d.NodePorts {
			c.nodePorts[p] = true
		}
		for _, p := range d.HostPorts {
			c.hostPorts[p] = true
		}
		for _, k := range d.Packets {
			c.packets[k] = true
		}
		external = external || d.External
		for _, k := range d.Gone {
			c.gone[k] = true
		}
	}
	out := c.delta()
	out.External = external
	return out
}

// change collects a Delta.
type change struct {
	subjects, pods, services, packets, gone map[string]bool
	addrs                                   map[netip.Addr]bool // of nodes and services
	nodePorts                               map[uint16]bool
	hostPorts                               map[HostPort]bool
	external                                map[netip.AddrPort]bool // came to be services', or ceased to, over TCP
	claimed                                 map[netip.Addr]bool     // that pods came to claim, or ceased to
	nodesMoved                              bool                    // some addresses of nodes are others
}

func newChange() *change {
	return &change{subjects: map[string]bool{}, pods: map[string]bool{}, services: map[string]bool{}, packets: map[string]bool{}, gone: map[string]bool{},
		addrs: map[netip.Addr]bool{}, nodePorts: map[uint16]bool{}, hostPorts: map[HostPort]bool{}, external: map[netip.AddrPort]bool{}, claimed: map[netip.Addr]bool{}}
}

func (c *change) delta() Delta {
	return Delta{
		Subjects: sortedKeys(c.subjects), Pods: sortedKeys(c.pods), Services: sortedKeys(c.services), Packets: sortedKeys(c.packets), Gone: sortedKeys(c.gone),
		Addrs: slices.SortedFunc(maps.Keys(c.addrs), netip.Addr.Compare), NodePorts: slices.Sorted(maps.Keys(c.nodePorts)),
		HostPorts: slices.SortedFunc(maps.Keys(c.hostPorts), HostPort.compare),
		External:  len(c.external) > 0,
	}
}

func (x *Index) finish(c *change) Delta {
	x.settle(c)
	return c.delta()
}

// settle marks what a change has touched in the index itself.
func (x *Index) settle(c *change) {
	clear(x.reached)
	clear(x.packets.ingress)
	for k := range c.subjects {
		if _, ok := x.subjects[k]; !ok {
			delete(c.subjects, k)
			continue
		}
		x.dirty[k] = true
	}
	for k := range c.gone {
		if _, ok := x.subjects[k]; ok {
			delete(c.gone, k)
		}
	}
	x.touchPackets(c)
}

func sortedKeys(m map[string]bool) []string {
	if len(m) == 0 {
		return nil
	}
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// Apply takes over an object that was created or changed. It fails, changing nothing, for a kind that decides nothing and for a
// pod whose identity has no name; whatever else is wrong in an object closes and is named by Problems.
func (x *Index) Apply(obj metav1.Object) (Delta, error) {
	c := newChange()
	if err := x.apply(obj, c); err != nil {
		return Delta{}, err
	}
	return x.finish(c), nil
}

func (x *Index) apply(obj metav1.Object, c *change) error {
	switch o := obj.(type) {
	case *corev1.Namespace:
		x.setNamespace(o.Name, o.Labels, c)
	case *corev1.Pod:
		return x.setPod(o, c)
	case *networkingv1.NetworkPolicy:
		x.setPolicy(o.Namespace, o.Namespace+"/"+o.Name, parsePolicy(o), c)
	case *corev1.Node:
		x.setNode(o, c)
	case *corev1.Service:
		x.services.set(o, c)
	case *discoveryv1.EndpointSlice:
		x.services.setSlice(o, c)
	default:
		return fmt.Errorf("policy index: %T decides nothing", obj)
	}
	return nil
}

// Delete takes an object out. Only its kind, namespace and name matter.
func (x *Index) Delete(obj metav1.Object) (Delta, error) {
	c := newChange()
	switch o := obj.(type) {
	case *corev1.Namespace:
		x.setNamespace(o.Name, nil, c)
	case *corev1.Pod:
		x.removePod(o.Namespace+"/"+o.Name, c)
	case *networkingv1.NetworkPolicy:
		x.setPolicy(o.Namespace, o.Namespace+"/"+o.Name, nil, c)
	case *corev1.Node:
		x.setNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: o.Name}}, c)
	case *corev1.Service:
		x.services.remove(o, c)
	case *discoveryv1.EndpointSlice:
		x.services.removeSlice(o, c)
	default:
		return Delta{}, fmt.Errorf("policy index: %T decides nothing", obj)
	}
	return x.finish(c), nil
}

// ApplyAll feeds a whole set of objects. One that cannot be taken over is an error, which does not keep the others from being.
func (x *Index) ApplyAll(o *Objects) error {
	var all []metav1.Object
	for _, n := range o.Nodes {
		all = append(all, n)
	}
	for _, n := range o.Namespaces {
		all = append(all, n)
	}
	for _, p := range o.NetworkPolicies {
		all = append(all, p)
	}
	for _, s := range o.Services {
		all = append(all, s)
	}
	for _, s := range o.EndpointSlices {
		all = append(all, s)
	}
	for _, p := range o.Pods {
		all = append(all, p)
	}
	c := newChange() // of all together: what each touches alone nobody asks
	var errs []error
	for _, obj := range all {
		errs = append(errs, x.apply(obj, c))
	}
	x.settle(c)
	return errors.Join(errs...)
}

// Problems names what is wrong in the policies that are held, sorted: "namespace/name: field: what".
func (x *Index) Problems() []string {
	var out []string
	for _, ns := range x.namespaces {
		for _, p := range ns.policies {
			for _, s := range p.problems {
				out = append(out, p.key+": "+s)
			}
		}
		if _, err := x.modeOf(ns); err != nil {
			out = append(out, fmt.Sprintf("namespace %s: label %s: %v; strict holds until it is mended", ns.name, ModeLabel, err))
		}
	}
	sort.Strings(out)
	return out
}

// modeOf is the mode of a namespace's workloads. A label that cannot be read closes: strict.
func (x *Index) modeOf(ns *namespace) (verdict.Mode, error) {
	s, ok := ns.labels[ModeLabel]
	if !ok {
		return x.defaultMode, nil
	}
	m, err := verdict.ParseMode(s)
	if err != nil {
		return verdict.Strict, err
	}
	return m, nil
}

func (x *Index) namespace(name string) *namespace {
	ns, ok := x.namespaces[name]
	if !ok {
		ns = &namespace{name: name, labels: map[string]string{}, identities: map[spiffeid.ID]*ident{}, pods: map[string]*pod{}, policies: map[string]*netpol{}}
		x.namespaces[name] = ns
		x.readers.begin(ns)
	}
	return ns
}

// setNamespace changes the labels of a namespace: subjects whose selectors now see it otherwise are affected, and its own where
// the mode changes.
func (x *Index) setNamespace(name string, labels map[string]string, c *change) {
	ns := x.namespace(name)
	before := *ns
	ns.labels = map[string]string{}
	for k, v := range labels {
		ns.labels[k] = v
	}
	for _, g := range x.readers.relabel(ns, before.labels) {
		for _, by := range g.readers {
			mark(c, by.subjects)
		}
		// A peer's egress rules see a destination's namespace otherwise, too.
		for p := range g.policies.all() {
			x.touchEgressOf(p, c)
		}
	}
	modeBefore, _ := x.modeOf(&before)
	if mode, _ := x.modeOf(ns); mode != modeBefore {
		for _, p := range ns.pods {
			x.rekey(p, c)
		}
	}
}

// setPolicy puts a policy in (or out: nil). Affected are the subjects that it selects or selected and, where it speaks of egress,
// those at which that egress is part of the verdict.
func (x *Index) setPolicy(namespace, key string, p *netpol, c *change) {
	ns := x.namespace(namespace)
	old := ns.policies[key]
	if p == nil {
		delete(ns.policies, key)
	} else {
		ns.policies[key] = p
	}
	ns.sorted = nil
	x.follow(old, p)
	x.countEdges(old, p, c)
	for _, q := range []*netpol{old, p} {
		if q == nil {
			continue
		}
		for _, id := range ns.identities {
			if q.pods.covers(id.stable, x.namer.Volatile) == none {
				continue
			}
			for _, pod := range id.pods {
				if pod.subject != nil && !c.subjects[pod.subject.Key] && q.pods.matches(pod.labels) {
					c.subjects[pod.subject.Key] = true
				}
			}
		}
		if q.egress.isolates {
			x.touchEgressOf(q, c)
		}
	}
}

// touchEgressOf marks the subjects at which the egress of the identities that a policy selects is part of the verdict.
func (x *Index) touchEgressOf(p *netpol, c *change) {
	touched := false
	for _, id := range x.namespace(p.namespace).identities {
		if p.pods.covers(id.stable, x.namer.Volatile) == none {
			continue
		}
		x.noteEgress(id)
		mark(c, x.readers.egress[id.id])
		touched = true
	}
	if touched {
		mark(c, x.readers.byAddress)
	}
}

// noteEgress keeps egressIsolated true for one identity.
func (x *Index) noteEgress(id *ident) {
	delete(x.egressIsolated, id.id)
	if len(id.pods) == 0 {
		return
	}
	for _, p := range x.namespace(id.namespace).policies {
		if p.egress.isolates && p.pods.covers(id.stable, x.namer.Volatile) != none {
			x.egressIsolated[id.id] = true
			return
		}
	}
}
