package policy

import (
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/identity"
	"github.com/mantlet/mantlet/verdict"
)

// pod is what decides about a pod.
type pod struct {
	key       string // "namespace/name"
	uid       string
	created   time.Time
	namespace string
	node      string // spec.nodeName
	labels    map[string]string
	ips       []netip.Addr
	hostIPs   []netip.Addr
	ports     []namedPort
	hostPorts []hostPort
	sidecar   bool
	ident     *ident
	subject   *Subject
}

// ident is an identity and the pods that have it now.
type ident struct {
	id        spiffeid.ID
	namespace string
	stable    map[string]string
	pods      map[string]*pod
}

func (i *ident) sorted() []*pod {
	out := slices.Collect(maps.Values(i.pods))
	slices.SortFunc(out, func(a, b *pod) int { return strings.Compare(a.key, b.key) })
	return out
}

func (i *ident) any() *pod { return first(i.pods) }

// first is the pod with the least key, so that "any" is always the same one.
func first(pods map[string]*pod) *pod {
	var out *pod
	for _, p := range pods {
		if out == nil || p.key < out.key {
			out = p
		}
	}
	return out
}

// portsDiffer reports whether pods of the identity call different ports by a name.
func (i *ident) portsDiffer() bool {
	var ref *pod
	for _, p := range i.pods {
		if ref == nil {
			ref = p
		}
		if !slices.Equal(ref.ports, p.ports) {
			return true
		}
	}
	return false
}

// Subject is a set of pods that share all verdicts.
type Subject struct {
	Key  string // opaque and stable: equal inputs, equal key
	ID   spiffeid.ID
	Mode verdict.Mode

	pods     map[string]*pod
	uses     uses
	verdicts *verdict.Verdicts
	hashes   Hashes                // of verdicts; none: nobody has asked yet
	deciders [2]*verdict.Evaluator // nil: nobody has asked; see ingress, egress

	packets     *packetPolicy // nil: nobody has asked since a change touched it
	packetNames []spiffeid.ID // whom it names, as the packetIndex has it
}

func (s *Subject) any() *pod { return first(s.pods) }

// Pods lists the pods of the subject, "namespace/name", sorted.
func (s *Subject) Pods() []string { return slices.Sorted(maps.Keys(s.pods)) }

// Names ranges over the same, in no order.
func (s *Subject) Names() iter.Seq[string] { return maps.Keys(s.pods) }

// uses is what the last compilation of a subject read, beside the policies that select it.
type uses struct {
	selectors      []*peerSelector // sorted by key, without duplicates
	egress         []spiffeid.ID   // identities whose egress policy is part of the verdicts, sorted
	ports          []spiffeid.ID   // identities whose named ports are, sorted
	byAddress      bool            // the egress of every identity is, and every pod without a sidecar
	namedByAddress bool            // the named ports of every pod are
}

// setPod puts a pod in. Pods that use the node's network and pods that have ended are not pods to a policy.
func (x *Index) setPod(o *corev1.Pod, c *change) error {
	key := o.Namespace + "/" + o.Name
	if o.Spec.HostNetwork || o.Status.Phase == corev1.PodSucceeded || o.Status.Phase == corev1.PodFailed {
		x.removePod(key, c)
		return nil
	}
	id, err := x.namer.ID(identity.Workload{Namespace: o.Namespace, ServiceAccount: o.Spec.ServiceAccountName, Labels: o.Labels})
	if err != nil {
		return fmt.Errorf("pod %s: %w", key, err)
	}
	p := &pod{
		key: key, uid: string(o.UID), created: o.CreationTimestamp.Time, namespace: o.Namespace, node: o.Spec.NodeName, labels: maps.Clone(o.Labels), ports: namedPorts(&o.Spec), hostPorts: hostPorts(&o.Spec),
		sidecar: o.Annotations[SidecarAnnotation] == SidecarInjected,
	}
	if p.ips, err = podAddrs(o.Status.PodIP, o.Status.PodIPs); err != nil {
		return fmt.Errorf("pod %s: status.podIPs: %w", key, err)
	}
	if p.hostIPs, err = hostAddrs(o.Status.HostIP, o.Status.HostIPs); err != nil {
		return fmt.Errorf("pod %s: status.hostIPs: %w", key, err)
	}
	old := x.pods[key]
	if old != nil && old.same(p, id) {
		return nil
	}
	x.removePod(key, c)
	x.insertPod(p, id, o.Labels, c)
	return nil
}

// same reports whether nothing that decides has changed.
func (p *pod) same(q *pod, id spiffeid.ID) bool {
	return p.ident.id == id && p.uid == q.uid && p.created.Equal(q.created) && p.sidecar == q.sidecar && p.node == q.node && maps.Equal(p.labels, q.labels) && slices.Equal(p.ips, q.ips) &&
		slices.Equal(p.hostIPs, q.hostIPs) && slices.Equal(p.ports, q.ports) && slices.Equal(p.hostPorts, q.hostPorts)
}

func (x *Index) insertPod(p *pod, id spiffeid.ID, labels map[string]string, c *change) {
	ns := x.namespace(p.namespace)
	i, ok := x.identities[id]
	if !ok {
		i = &ident{id: id, namespace: p.namespace, stable: x.namer.Stable(labels), pods: map[string]*pod{}}
		x.identities[id], ns.identities[id] = i, i
	}
	portsDiffered := i.portsDiffer()
	p.shareWith(i)
	p.ident = i
	i.pods[p.key], ns.pods[p.key], x.pods[p.key] = p, p, p
	if !p.sidecar {
		x.plain[p.key] = p
	}
	c.pods[p.key] = true
	x.noteEgress(i)
	x.claim(p, c)
	x.hosts.enter(p, c)
	x.touchRetiredAt(p.ips, c)
	x.touchPeersOf(p, !ok || i.portsDiffer() != portsDiffered || len(i.pods) == 1, c)
	x.rekey(p, c)
}

// shareWith has a pod use what another of its identity has already, where it is the same: replicas differ in little.
func (p *pod) shareWith(i *ident) {
	for _, q := range i.pods {
		if maps.Equal(p.labels, q.labels) {
			p.labels = q.labels
		}
		if slices.Equal(p.ports, q.ports) {
			p.ports = q.ports
		}
		if slices.Equal(p.hostPorts, q.hostPorts) {
			p.hostPorts = q.hostPorts
		}
		return // one is asked: nearly always any does
	}
}

func (x *Index) removePod(key string, c *change) {
	p := x.pods[key]
	if p == nil {
		return
	}
	i := p.ident
	portsDiffered := i.portsDiffer()
	delete(x.pods, key)
	delete(x.plain, key)
	delete(x.namespace(p.namespace).pods, key)
	delete(i.pods, key)
	x.disclaim(p, c)
	x.hosts.leave(p, c)
	x.touchRetiredAt(p.ips, c)
	c.pods[key] = true
	gone := len(i.pods) == 0
	x.touchPeersOf(p, gone || i.portsDiffer() != portsDiffered, c)
	if gone {
		delete(x.identities, i.id)
		delete(x.namespace(p.namespace).identities, i.id)
	}
	x.noteEgress(i)
	x.leaveSubject(p, c)
}

// claim notes the addresses of a pod. Two pods claim one address for a while where it is used again before the old pod's object is
// gone: see owner.
func (x *Index) claim(p *pod, c *change) {
	for _, a := range p.ips {
		if x.services.external.claims[a] != nil {
			c.claimed[a] = true
		}
		if len(x.claims[a]) == 0 {
			x.claims[a] = []*pod{p}
			if !x.inPodNetwork(a) {
				x.outside[a] = struct{}{}
			}
			continue
		}
		before := x.owner(a)
		x.claims[a] = append(x.claims[a], p)
		x.newOwner(a, before, c)
	}
}

func (x *Index) disclaim(p *pod, c *change) {
	for _, a := range p.ips {
		if x.services.external.claims[a] != nil {
			c.claimed[a] = true
		}
		before := x.owner(a)
		rest := slices.DeleteFunc(slices.Clone(x.claims[a]), func(q *pod) bool { return q == p })
		if len(rest) == 0 {
			delete(x.claims, a)
			delete(x.outside, a)
			continue
		}
		x.claims[a] = rest
		x.newOwner(a, before, c)
	}
}

// newOwner marks what rests on an address that went from one claimant to another.
func (x *Index) newOwner(a netip.Addr, before *pod, c *change) {
	if x.owner(a) == before {
		return
	}
	for _, p := range append(slices.Clone(x.claims[a]), before) {
		if p == nil {
			continue
		}
		c.pods[p.key] = true
		x.touchPeersOf(p, false, c)
	}
}

// owner is the pod that an address belongs to: of several that claim it the one created last. It is nil where nobody claims it, and
// where two claim it that were created in the same second: as long as nobody can tell, it is nobody's.
func (x *Index) owner(a netip.Addr) *pod {
	var out *pod
	tie := false
	for _, p := range x.claims[a] {
		switch {
		case out == nil || p.created.After(out.created):
			out, tie = p, false
		case p.created.Equal(out.created):
			tie = true
		}
	}
	if tie {
		return nil
	}
	return out
}

// owned lists the addresses that belong to a pod.
func (x *Index) owned(p *pod) []netip.Addr {
	var out []netip.Addr
	for _, a := range p.ips {
		if x.owner(a) == p {
			out = append(out, a)
		}
	}
	return out
}

// touchPeersOf marks the subjects that list a pod: by address if it has no sidecar or if rules tell the pods of its identity
// apart, and by identity if that is new, gone, or means other ports than before. One more replica of a known identity marks nobody.
func (x *Index) touchPeersOf(p *pod, identityChanged bool, c *change) {
	id := p.ident
	ns := x.namespace(p.namespace)
	apart := x.egressTellsApart(id) || x.isBound(id.namespace)
	differ := id.portsDiffer() // then rules with named ports list its pods by address
	outside := slices.ContainsFunc(p.ips, func(a netip.Addr) bool { return !x.inPodNetwork(a) })
	r := &x.readers
	if !p.sidecar || apart || outside || identityChanged && x.egressIsolated[id.id] {
		mark(c, r.byAddress)
	}
	if apart {
		mark(c, r.egress[id.id])
	}
	if identityChanged || differ {
		mark(c, r.ports[id.id])
	}
	if len(p.ports) > 0 {
		mark(c, r.namedByAddress)
	}
	for g := range ns.groups.all() {
		for _, by := range g.readers {
			m := by.selector.pods.covers(id.stable, x.namer.Volatile)
			if m == some || m == every && (identityChanged || !p.sidecar || apart) {
				mark(c, by.subjects)
			}
		}
	}
}

// rekey puts a pod into the subject that it belongs to.
func (x *Index) rekey(p *pod, c *change) {
	ns := x.namespace(p.namespace)
	mode, _ := x.modeOf(ns)
	key := x.subjectKey(p, mode)
	if p.subject != nil && p.subject.Key == key {
		return
	}
	x.leaveSubject(p, c)
	s, ok := x.subjects[key]
	if !ok {
		s = &Subject{Key: key, ID: p.ident.id, Mode: mode, pods: map[string]*pod{}}
		x.subjects[key] = s
		c.subjects[key] = true
	}
	s.pods[p.key] = p
	p.subject = s
	c.pods[p.key] = true
}

func (x *Index) leaveSubject(p *pod, c *change) {
	s := p.subject
	if s == nil {
		return
	}
	p.subject = nil
	delete(s.pods, p.key)
	if len(s.pods) == 0 {
		delete(x.subjects, s.Key)
		c.gone[s.Key] = true
		delete(x.dirty, s.Key)
		x.read(s, uses{})
		x.packets.forget(s)
	}
}

// subjectKey writes down everything that the compiler reads of a pod.
func (x *Index) subjectKey(p *pod, mode verdict.Mode) string {
	b := make([]byte, 0, 192)
	b = append(b, p.ident.id.String()...)
	b = append(b, ' ')
	b = append(b, mode.String()...)
	for _, np := range p.ports {
		b = append(b, ' ')
		b = append(b, np.name...)
		b = append(b, '=')
		b = strconv.AppendUint(b, uint64(np.number), 10)
		b = append(b, '/')
		b = append(b, np.protocol.String()...)
	}
	for _, k := range slices.Sorted(maps.Keys(x.volatileKeys)) {
		if v, ok := p.labels[k]; ok {
			b = append(b, ' ')
			b = append(b, k...)
			b = append(b, '=')
			b = append(b, v...)
		}
	}
	for _, a := range p.ips {
		b = append(b, " v"...)
		b = strconv.AppendInt(b, int64(family(a)), 10)
		if !x.inPodNetwork(a) { // boundaries are counted inside it only
			b = append(b, ',')
			b = a.AppendTo(b)
		}
		for e := range x.boundaries.Supernets(host(a)) {
			b = append(b, ',')
			b = e.AppendTo(b)
		}
	}
	return string(b)
}

// plainPods lists the pods without a sidecar that rules may admit, and maybe others, sorted. covered are the identities that their selectors cover.
func (x *Index) plainPods(rules []*rule, covered map[*ident]bool) []*pod {
	from := x.plain
	if !slices.ContainsFunc(rules, func(r *rule) bool { return r.anyone || len(r.blocks) > 0 }) {
		from = map[string]*pod{}
		for id := range covered {
			for key, p := range id.pods {
				if !p.sidecar {
					from[key] = p
				}
			}
		}
	}
	out := slices.Collect(maps.Values(from))
	slices.SortFunc(out, func(a, b *pod) int { return strings.Compare(a.key, b.key) })
	return out
}

// podAddrs reads status.podIPs, or podIP where that is all there is. Addresses are unmapped, in the order given.
func podAddrs(ip string, ips []corev1.PodIP) ([]netip.Addr, error) {
	var list []string
	for _, i := range ips {
		list = append(list, i.IP)
	}
	return addrs(ip, list)
}

func hostAddrs(ip string, ips []corev1.HostIP) ([]netip.Addr, error) {
	var list []string
	for _, i := range ips {
		list = append(list, i.IP)
	}
	return addrs(ip, list)
}

func addrs(one string, list []string) ([]netip.Addr, error) {
	if len(list) == 0 && one != "" {
		list = []string{one}
	}
	var out []netip.Addr
	for _, s := range list {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, err
		}
		out = append(out, a.Unmap().WithZone(""))
	}
	return out, nil
}
