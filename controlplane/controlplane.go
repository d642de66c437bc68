package controlplane

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity/attest"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/verdict/wire"
	"github.com/mantlet/mantlet/xds"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// Config is what a ControlPlane needs to know beside the objects.
type Config struct {
	Policy policy.Config
	// ServiceNetwork holds the ranges from which Services get their cluster IPs.
	ServiceNetwork []netip.Prefix
	// NodePorts is the API server's --service-node-port-range; zero: verdict.DefaultNodePorts.
	NodePorts verdict.PortRange
	// Resumption says whether sidecars resume TLS sessions; zero: they do.
	Resumption xds.Resumption
	// SVIDTTL is how long certificates are valid; zero: ca.DefaultTTL.
	SVIDTTL time.Duration
	// Records keeps what is retired for other replicas and for later; nil: this process alone knows of it, as long as it lives.
	Records Records
	Now     func() time.Time // nil: time.Now
	Log     *slog.Logger     // nil: nothing is logged
}

// ControlPlane holds the policy index and keeps the xDS server's sidecars up to date with it. It is safe for concurrent use.
type ControlPlane struct {
	policy    policy.Config
	cluster   []netip.Prefix // where sidecars find each other: pod and service networks
	nodePorts verdict.PortRange
	sessions  xds.Resumption
	svidTTL   time.Duration
	now       func() time.Time
	log       *slog.Logger
	xds       *server.Server
	records   Records   // nil: none
	began     time.Time // the pods that it is loaded with were listed by then

	authority *ca.CA // signs for the pods; nil: somebody else does

	mu           sync.Mutex
	given        map[string]given // by pod: what the authority gave it last
	givenChanged chan struct{}    // closed when given changes
	index        *policy.Index
	changes      uint64                   // counts what has changed index
	moves        uint64                   // counts those changes that were about pods, services or nodes, and not about policy alone
	hashes       map[string]policy.Hashes // of the verdicts that are in force, by subject key; only of subjects that matter to somebody
	rendered     map[string]*rendered     // by subject key; only of subjects with sidecars
	packets      packets
	resources    packetResources
	sweepPackets int                      // how many packetResources there may be before those of no use are taken out
	nodes        map[string]nodeResources // by node addresses
	outbound     outbound
	static       []*server.Resource // clusters, the same for everybody
	demand       demand
	required     requiring
	published    map[string]bool // pods of which the present publish has been so far
	loaded       bool            // objects are complete: nothing is published before
	expiry       *time.Timer     // of what is retired; nil: nothing is
	closed       bool
}

// rendered is what is made of one subject's verdicts.
type rendered struct {
	hashes     policy.Hashes
	gate, rbac *server.Resource
	verdicts   *server.Resource   // for the agent
	sets       map[string]nodeSet // by node addresses
}

// nodeSet is what the sidecars of a subject on one node hold, with these packets and this network.
type nodeSet struct {
	packets, network *server.Resource
	set              server.Set
}

// New returns a ControlPlane that publishes through the server made from sc; its Authenticator must be set, its OnDemand is set
// here.
func New(c Config, sc server.Config) (*ControlPlane, error) {
	if c.SVIDTTL == 0 {
		c.SVIDTTL = ca.DefaultTTL
	}
	if c.NodePorts == (verdict.PortRange{}) {
		c.NodePorts = verdict.DefaultNodePorts
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Policy.ServiceNetwork = c.ServiceNetwork
	cp := &ControlPlane{
		policy:    c.Policy,
		cluster:   slices.Concat(c.Policy.PodNetwork, c.ServiceNetwork),
		nodePorts: c.NodePorts,
		sessions:  c.Resumption,
		svidTTL:   c.SVIDTTL,
		now:       c.Now,
		log:       c.Log,
		records:   c.Records,
		began:     c.Now(),
		index:     policy.NewIndex(c.Policy),
		given:     map[string]given{}, givenChanged: make(chan struct{}),
		hashes:    map[string]policy.Hashes{},
		rendered:  map[string]*rendered{},
		packets:   packets{},
		resources: packetResources{},
		nodes:     map[string]nodeResources{},
		outbound:  outbound{},
		demand:    newDemand(),
		required:  requiring{},
	}
	for _, cl := range xds.Clusters() {
		r, err := resource(cl)
		if err != nil {
			return nil, err
		}
		cp.static = append(cp.static, r)
	}
	sc.OnDemand = cp
	unsubscribed := sc.OnUnsubscribe
	sc.OnUnsubscribe = func(c server.Client, names []string) {
		cp.forgetNames(names)
		if unsubscribed != nil {
			unsubscribed(c, names)
		}
	}
	cp.xds = server.New(sc)
	return cp, nil
}

// Server is the xDS server that the ControlPlane publishes through.
func (cp *ControlPlane) Server() *server.Server { return cp.xds }

// Load takes over a whole set of objects and then publishes to everybody. Until it is called nothing is published: half a set of
// policies would be wrong policy. It is for the start; later changes are Updates. An object that cannot be taken over is an error, which
// does not keep the others from taking effect.
func (cp *ControlPlane) Load(o *policy.Objects) error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	cp.changes++
	cp.moves++
	err := cp.index.ApplyAll(o)
	cp.required.load(o.Namespaces)
	cp.loaded = true
	for _, p := range cp.index.Problems() {
		cp.log.Error("a policy is invalid and closed for what it cannot say", "problem", p)
	}
	return errors.Join(err, cp.publish(policy.Delta{Subjects: cp.index.SubjectKeys(), Addrs: cp.index.ExternalAddrs(), NodePorts: cp.index.NodePorts(),
		HostPorts: cp.index.ClaimedHostPorts()}))
}

// Apply takes over an object that was created or changed.
func (cp *ControlPlane) Apply(obj metav1.Object) error {
	return cp.Update([]metav1.Object{obj}, nil)
}

// Delete takes an object out.
func (cp *ControlPlane) Delete(obj metav1.Object) error {
	return cp.Update(nil, []metav1.Object{obj})
}

// Update takes objects over and others out as one change: nobody is sent what holds in between. An object that cannot be taken over
// is an error, which does not keep the others from taking effect.
func (cp *ControlPlane) Update(applied, deleted []metav1.Object) error {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	var touched []policy.Delta
	var errs []error
	take := func(d policy.Delta, err error) {
		touched = append(touched, d)
		errs = append(errs, err)
	}
	cp.changes++
	before := cp.present(applied, deleted)
	for _, obj := range deleted {
		take(cp.index.Delete(obj))
		cp.required.delete(obj)
	}
	for _, obj := range applied {
		take(cp.index.Apply(obj))
		cp.required.apply(obj)
	}
	touched = append(touched, cp.succeed(before)...)
	if cp.loaded {
		errs = append(errs, cp.publish(policy.Merge(touched)))
	}
	return errors.Join(errs...)
}

// publish sends what a Delta has changed to whom it concerns.
func (cp *ControlPlane) publish(d policy.Delta) error {
	if len(d.Pods)+len(d.Services)+len(d.Addrs)+len(d.NodePorts)+len(d.HostPorts) > 0 {
		cp.moves++
	}
	var errs []error
	stale := map[string]bool{} // on-demand names
	cp.published = map[string]bool{}
	if d.External {
		cp.forgetNetworks()
	}
	for _, key := range d.Subjects {
		errs = append(errs, cp.publishChanged(key, stale))
	}
	for _, name := range d.Pods {
		cp.demand.collect(stale, podKey(name))
		p, ok := cp.index.Pod(name)
		if !ok || !p.Sidecar {
			cp.xds.Forget(server.Client(name))
		}
		if !ok {
			continue
		}
		for _, a := range p.Addrs {
			cp.demand.collect(stale, addrKey(a))
		}
		for _, own := range cp.xds.Subscriptions(server.Client(name)) { // it may be somebody else now
			stale[own] = true
		}
		errs = append(errs, cp.publishPod(p))
	}
	errs = append(errs, cp.publishPackets(d.Packets), cp.publishHostPorts(d.HostPorts, stale))
	if d.External {
		errs = append(errs, cp.publishAll())
	}
	for _, name := range d.Services {
		cp.demand.collect(stale, serviceKey(name))
	}
	for _, a := range d.Addrs {
		cp.demand.collect(stale, addrKey(a))
		cp.warnContests(a)
	}
	for _, port := range d.NodePorts {
		if r := cp.nodePorts; port < r.First || port > r.Last {
			cp.log.Error("a node port outside the range that sidecars ask about: over TCP whoever may reach a node reaches its service, past policy; choose another, or set nodePorts to the API server's range",
				"port", port, "range", r.String())
		}
		cp.demand.collect(stale, nodePortKey(port))
	}
	cp.refresh(stale)
	cp.sweep(d.Gone)
	return errors.Join(errs...)
}

// publishChanged publishes to a subject's sidecars if its verdicts are other ones than before, and notes the on-demand clusters that rest on them:
// on egress those that its sidecars hold, on ingress those that lead to its pods, which may have no sidecar of their own.
func (cp *ControlPlane) publishChanged(key string, stale map[string]bool) error {
	s := cp.index.SubjectByKey(key)
	if s == nil {
		return nil
	}
	if !cp.matters(s) {
		delete(cp.hashes, key) // whoever comes to rest on it is answered anew at its next change
		return nil
	}
	before, now := cp.hashes[key], cp.index.Hashes(key)
	if before == now {
		return nil
	}
	cp.hashes[key] = now
	for pod := range s.Names() {
		if before.Ingress != now.Ingress {
			cp.demand.collect(stale, podKey(pod))
		}
		if before.Egress == now.Egress {
			continue
		}
		for _, name := range cp.xds.Subscriptions(server.Client(pod)) {
			stale[name] = true
		}
	}
	return cp.publishSubject(key)
}

// matters reports whether anybody holds anything that rests on a subject's verdicts: a sidecar of its own, or one that has asked for a destination
// among its pods. Those of others are compiled when somebody asks: in a cluster where few pods have sidecars they are nearly all.
func (cp *ControlPlane) matters(s *policy.Subject) bool {
	for name := range s.Names() {
		if p, ok := cp.index.Pod(name); ok && p.Sidecar || len(cp.demand.names[podKey(name)]) > 0 {
			return true
		}
	}
	return false
}

// refresh has the on-demand clusters with these names resolved anew for everybody who uses them.
func (cp *ControlPlane) refresh(names map[string]bool) {
	byClient := map[server.Client][]string{}
	for name := range names {
		for _, c := range cp.xds.Subscribers(name) {
			byClient[c] = append(byClient[c], name)
		}
	}
	for c, list := range byClient {
		slices.Sort(list)
		cp.xds.Refresh(c, list...)
	}
}

// sweep drops what was rendered for subjects that are gone.
func (cp *ControlPlane) sweep(gone []string) {
	for _, key := range gone {
		if cp.index.SubjectByKey(key) == nil {
			delete(cp.hashes, key)
			delete(cp.rendered, key)
			delete(cp.packets, key)
		}
	}
}

func (cp *ControlPlane) publishSubject(key string) error {
	s := cp.index.SubjectByKey(key)
	for _, name := range s.Pods() {
		if p, ok := cp.index.Pod(name); ok {
			if err := cp.publishPod(p); err != nil {
				return err
			}
		}
	}
	return nil
}

// publishPod hands a pod's sidecar everything that it should hold, apart from what it asks for: once in a publish, for whatever reasons.
func (cp *ControlPlane) publishPod(p policy.Pod) error {
	if !p.Sidecar || !cp.loaded || cp.published[p.Name] {
		return nil
	}
	cp.published[p.Name] = true
	set, err := cp.set(p)
	if err != nil {
		return fmt.Errorf("pod %s: %w", p.Name, err)
	}
	cp.xds.Publish(server.Client(p.Name), set)
	return nil
}

// set returns the resources of a pod's sidecar: those of its subject, and those that depend on its node.
func (cp *ControlPlane) set(p policy.Pod) (server.Set, error) {
	v := cp.index.Verdicts(p.Subject.Key)
	r := cp.rendered[p.Subject.Key]
	if hashes := cp.index.Hashes(p.Subject.Key); r == nil || r.hashes != hashes {
		r = &rendered{hashes: hashes, sets: map[string]nodeSet{}}
		var err error
		if r.gate, err = resource(xds.Gate(v)); err != nil {
			return server.Set{}, err
		}
		if r.rbac, err = resource(xds.RBAC(v)); err != nil {
			return server.Set{}, err
		}
		if r.verdicts, err = server.NewResource(names.Verdicts, wire.Message(v)); err != nil {
			return server.Set{}, err
		}
		cp.rendered[p.Subject.Key] = r
	}
	packets, err := cp.packetsOf(p)
	if err != nil {
		return server.Set{}, err
	}
	node := nodeKey(p.NodeIPs)
	network := cp.network(p)
	own, err := cp.forNode(node, network)
	if err != nil {
		return server.Set{}, err
	}
	if is, ok := r.sets[node]; ok && is.packets == packets && is.network == own.network {
		return is.set, nil
	}
	outbound, err := cp.outbound.listener(outboundKey{r.hashes.Egress, node, portsKey(network.HostPorts)}, func() (*server.Resource, error) {
		return resource(xds.Outbound(v, network))
	})
	if err != nil {
		return server.Set{}, err
	}
	set, err := server.NewSet(append(slices.Clone(cp.static), r.gate, r.rbac, r.verdicts, packets, own.inbound, own.network, outbound)...)
	if err != nil {
		return server.Set{}, err
	}
	r.sets[node] = nodeSet{packets, own.network, set}
	return set, nil
}

// nodeResources are what depends on a pod's node and on nothing else.
type nodeResources struct {
	inbound, network *server.Resource
	hostPorts        []netip.AddrPort // that network has
}

func (cp *ControlPlane) forNode(node string, n *verdict.Network) (nodeResources, error) {
	if r, ok := cp.nodes[node]; ok && slices.Equal(r.hostPorts, n.HostPorts) {
		return r, nil
	}
	r := nodeResources{hostPorts: n.HostPorts}
	var err error
	if r.inbound, err = resource(xds.Inbound(n.Node, cp.sessions)); err != nil {
		return r, err
	}
	if r.network, err = server.NewResource(names.Network, wire.NetworkMessage(n)); err != nil {
		return r, err
	}
	cp.nodes[node] = r
	return r, nil
}

func resource(m interface {
	proto.Message
	GetName() string
}) (*server.Resource, error) {
	return server.NewResource(m.GetName(), m)
}

// Identity tells the identity of an attested pod (an attest.Lookup).
func (cp *ControlPlane) Identity(pod attest.Pod) (spiffeid.ID, error) {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	p, ok := cp.index.Pod(pod.String())
	if !ok || p.UID != pod.UID {
		return spiffeid.ID{}, fmt.Errorf("%w: %s with UID %s", attest.ErrUnknownPod, pod, pod.UID)
	}
	if !p.Sidecar {
		return spiffeid.ID{}, fmt.Errorf("pod %s is not injected: it gets no identity", pod)
	}
	return p.Subject.ID, nil
}

// Answer decides one connection as the sidecars will (see policy.Index.Answer).
func (cp *ControlPlane) Answer(from string, proto verdict.Protocol, to netip.AddrPort) policy.Answer {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	return cp.index.Answer(from, proto, to)
}
