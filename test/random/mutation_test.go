package random

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/verdict"
)

var steps = flag.Int("steps", 60, "how many changes each world of the mutation test goes through")

// TestVerdictsFollowChanges changes objects in place: labels of namespaces and pods, addresses, ports, sidecars, nodes, whole policies,
// services and their endpoints; some come and go. After each change the index that followed all of them must say what a fresh one
// says, and its Deltas must have named whatever changed since verdicts were last read. What a world ends as is held against the oracle.
func TestVerdictsFollowChanges(t *testing.T) {
	moved := 0                          // pods whose verdicts a change altered: zero would prove nothing
	for i := range (*worlds + 9) / 10 { // each step of a world compiles another one anew
		moved += followChanges(t, *seed+uint64(i))
	}
	if moved < *worlds {
		t.Errorf("the changes altered the verdicts of %d pods only", moved)
	}
	t.Logf("%d pods changed verdicts", moved)
}

func followChanges(t *testing.T, s uint64) (moved int) {
	r := rand.New(rand.NewPCG(s, 2))
	m := &mutant{Rand: r, World: oracle.Generate(r, oracle.Small)}
	x, err := indexOf(m.World)
	if err != nil {
		t.Fatal(err)
	}
	before := read(x, m.Objects.Pods)
	var named policy.Delta // since verdicts were last read
	for range *steps {
		for _, c := range m.change() {
			act := x.Apply
			if c.gone {
				act = x.Delete
			}
			d, err := act(c.object)
			if err != nil {
				t.Fatalf("world %d: %s: %v", s, strings.Join(m.story, "; "), err)
			}
			named.Subjects = append(named.Subjects, d.Subjects...)
			named.Pods = append(named.Pods, d.Pods...)
			named.Services = append(named.Services, d.Services...)
		}
		if r.IntN(4) == 0 {
			continue // some changes come in a bundle, with nobody reading in between
		}
		fresh, err := indexOf(m.World)
		if err != nil {
			t.Fatal(err)
		}
		after := read(x, m.Objects.Pods)
		if diff := m.compare(fresh, x, after); diff != "" {
			t.Fatalf("world %d: %s\n%s\n%s", s, strings.Join(m.story, "\n"), diff, m.YAML())
		}
		n, diff := unnamed(before, after, named)
		if diff != "" {
			t.Fatalf("world %d: %s\n%s\n%s", s, strings.Join(m.story, "\n"), diff, m.YAML())
		}
		moved += n
		before, named = after, policy.Delta{}
	}
	w := m.running()
	if c, got, why, found := differ(w); found {
		t.Fatalf("world %d: %s\n%s\ncompiler: %+v\noracle: %s\n%s", s, strings.Join(m.story, "\n"), c, got, why, w.YAML())
	}
	return moved
}

// running is the World as the oracle knows it: without pods that have ended.
func (m *mutant) running() oracle.World {
	w := m.World
	w.Objects.Pods = slices.DeleteFunc(slices.Clone(w.Objects.Pods), ended)
	return w
}

func ended(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// reading is what an index says of everything.
type reading struct {
	pods     map[string]podReading
	services map[netip.AddrPort]string // which addresses a cluster IP stands for
}

// podReading is what an index says of a pod.
type podReading struct{ subject, hash, seen string }

// read reads all pods. What others see of a pod is in it, too: who depends on that has to be told by name.
func read(x *policy.Index, pods []*corev1.Pod) reading {
	hashes := map[string]string{}
	for _, k := range x.SubjectKeys() { // also of pods that should not be there any more
		hashes[k] = x.Verdicts(k).Hash()
	}
	out := reading{map[string]podReading{}, map[netip.AddrPort]string{}}
	for i := range serviceAddrs {
		for _, port := range servicePorts {
			to := netip.AddrPortFrom(serviceAddr(i), uint16(port))
			d, ok := x.Destination(verdict.TCP, to)
			text := fmt.Sprint(ok)
			for _, e := range d.Endpoints {
				text += " " + e.Addr.String()
			}
			out.services[to] = text
		}
	}
	for _, o := range pods {
		p, ok := x.Pod(key(o))
		if !ok {
			continue
		}
		out.pods[p.Name] = podReading{p.Subject.Key, hashes[p.Subject.Key], fmt.Sprint(p.UID, p.Subject.ID, p.Addrs, p.NodeIPs, p.Sidecar)}
	}
	return out
}

// unnamed finds a change that no Delta named, and counts the changes that one did.
func unnamed(before, after reading, d policy.Delta) (n int, diff string) {
	for i := range serviceAddrs {
		for _, port := range servicePorts {
			to := netip.AddrPortFrom(serviceAddr(i), uint16(port))
			if before.services[to] != after.services[to] && !slices.Contains(d.Services, fmt.Sprintf("ns0/svc%d", i)) {
				return n, fmt.Sprintf("%s stood for %s and stands for %s, and no delta names its service", to, before.services[to], after.services[to])
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(before.pods)) {
		if _, ok := after.pods[name]; !ok && !slices.Contains(d.Pods, name) {
			return n, fmt.Sprintf("pod %s went, and no delta says so", name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(after.pods)) {
		old, now := before.pods[name], after.pods[name]
		byPod := slices.Contains(d.Pods, name)
		switch {
		case (old.subject != now.subject || old.seen != now.seen) && !byPod:
			return n, fmt.Sprintf("pod %s changed from %+v to %+v, and no delta names it", name, old, now)
		case old.hash != now.hash && !byPod && !slices.Contains(d.Subjects, now.subject):
			return n, fmt.Sprintf("the verdicts of pod %s changed, and no delta names it or its subject %s", name, now.subject)
		case old.hash != now.hash:
			n++
		}
	}
	return n, ""
}

// mutant is a World that changes.
type mutant struct {
	oracle.World
	*rand.Rand
	made  int
	story []string
}

// event is what an index is told.
type event struct {
	object metav1.Object
	gone   bool
}

func (m *mutant) tell(format string, args ...any) {
	m.story = append(m.story, fmt.Sprintf(format, args...))
}

func (m *mutant) chance(percent int) bool { return m.IntN(100) < percent }

func choose[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func asYAML(v *verdict.Verdicts) string {
	text, err := yaml.Marshal(v)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// compare says in what an index differs from a fresh one.
func (m *mutant) compare(fresh, x *policy.Index, after reading) string {
	got, want := after.pods, read(fresh, m.Objects.Pods).pods
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if want[name] != got[name] {
			return fmt.Sprintf("pod %s: %+v, and a fresh index says %+v\n-want +got\n%s", name, got[name], want[name],
				cmp.Diff(asYAML(fresh.Verdicts(want[name].subject)), asYAML(x.Verdicts(got[name].subject))))
		}
	}
	if len(got) != len(want) || !slices.Equal(fresh.SubjectKeys(), x.SubjectKeys()) {
		return fmt.Sprintf("subjects %q, and a fresh index has %q", x.SubjectKeys(), fresh.SubjectKeys())
	}
	if !slices.Equal(fresh.Problems(), x.Problems()) {
		return fmt.Sprintf("problems %q, and a fresh index has %q", x.Problems(), fresh.Problems())
	}
	var targets []netip.AddrPort
	for _, p := range m.Objects.Pods {
		for _, a := range oracle.Addresses(p) {
			targets = append(targets, netip.AddrPortFrom(a, 80))
		}
	}
	for i := range serviceAddrs {
		for _, port := range servicePorts {
			targets = append(targets, netip.AddrPortFrom(serviceAddr(i), uint16(port)))
		}
	}
	for _, to := range targets {
		a, okA := fresh.Destination(verdict.TCP, to)
		b, okB := x.Destination(verdict.TCP, to)
		if fmt.Sprint(a, okA) != fmt.Sprint(b, okB) {
			return fmt.Sprintf("%s stands for %+v (%v), and a fresh index says %+v (%v)", to, b, okB, a, okA)
		}
		for _, p := range m.Objects.Pods {
			if a, b := fresh.Answer(key(p), verdict.TCP, to), x.Answer(key(p), verdict.TCP, to); a != b {
				return fmt.Sprintf("%s to %s: %+v, and a fresh index says %+v", key(p), to, b, a)
			}
		}
	}
	return ""
}

// change makes one change and returns its events.
func (m *mutant) change() []event {
	for {
		var es []event
		switch n := m.IntN(100); {
		case n < 12:
			es = m.changeNamespace()
		case n < 62:
			es = m.changePod()
		case n < 85:
			es = m.changePolicy()
		default:
			es = m.changeService()
		}
		if es != nil {
			return es
		}
	}
}

// donor is another world, from which pieces are taken.
func (m *mutant) donor() oracle.World {
	for {
		if w := oracle.Generate(m.Rand, oracle.Small); len(w.Objects.NetworkPolicies) > 0 {
			return w
		}
	}
}

func (m *mutant) changeNamespace() []event {
	i := m.IntN(len(m.Objects.Namespaces))
	ns := m.Objects.Namespaces[i].DeepCopy()
	m.Objects.Namespaces[i] = ns
	switch m.IntN(4) {
	case 0:
		m.tell("namespace %s loses its labels", ns.Name)
		ns.Labels = nil
		if m.chance(50) { // nothing that decides is left of a namespace without labels
			return []event{{ns, true}}
		}
	case 1:
		mode := choose(m.Rand, []string{"permissive", "strict", "nonsense"})
		m.tell("namespace %s becomes %s", ns.Name, mode)
		ns.Labels = with(ns.Labels, policy.ModeLabel, mode)
	case 2:
		m.tell("namespace %s is named by a label", ns.Name)
		ns.Labels = with(ns.Labels, corev1.LabelMetadataName, ns.Name)
	default:
		team := choose(m.Rand, []string{"a", "b", "c", ""})
		m.tell("namespace %s goes to team %q", ns.Name, team)
		ns.Labels = with(ns.Labels, "team", team)
	}
	return []event{{ns, false}}
}

// with is a changed copy: an index may hold the map that it was given.
func with(labels map[string]string, k, v string) map[string]string {
	out := maps.Clone(labels)
	if out == nil {
		out = map[string]string{}
	}
	out[k] = v
	return out
}

// freshAddrs are addresses that no pod has had: in the pod network, on either side of what blocks divide.
func (m *mutant) freshAddrs() []corev1.PodIP {
	m.made++
	v4 := corev1.PodIP{IP: fmt.Sprintf("10.64.%d.%d", m.made%2, 30+m.made%200)}
	v6 := corev1.PodIP{IP: netip.MustParseAddr(fmt.Sprintf("fd00:10:64::%x:%x", m.made%2, 0x100+m.made)).String()}
	return [][]corev1.PodIP{{v4, v6}, {v4, v6}, {v4}, {v6}, {v6, v4}, nil}[m.IntN(6)]
}

func (m *mutant) changePod() []event {
	pods := m.Objects.Pods
	i := m.IntN(len(pods))
	p := pods[i].DeepCopy()
	name := key(p)
	switch m.IntN(15) {
	case 0:
		if len(pods) < 3 {
			return nil
		}
		m.tell("pod %s goes", name)
		m.Objects.Pods = slices.Delete(slices.Clone(pods), i, i+1)
		return []event{{pods[i], true}}
	case 1, 2: // another replica
		if len(pods) > 16 {
			return nil
		}
		m.made++
		p.Name, p.UID = fmt.Sprintf("new%d", m.made), ""
		if p.Spec.HostNetwork {
			return nil
		}
		p.Status.PodIPs, p.Status.PodIP = m.freshAddrs(), ""
		if m.chance(30) {
			p.Spec.Containers, p.Spec.InitContainers = m.containers()
		}
		m.tell("pod %s comes: a replica of %s with %v", key(p), name, p.Status.PodIPs)
		m.Objects.Pods = append(slices.Clone(pods), p)
		return []event{{p, false}}
	case 3:
		p.UID += "x"
		m.tell("pod %s is another one of the same name", name)
	case 4:
		if m.chance(50) {
			p.Annotations = nil
		} else {
			p.Annotations = map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}
		}
		m.tell("pod %s: annotations %v", name, p.Annotations)
	case 5, 6:
		if p.Spec.HostNetwork {
			return nil
		}
		p.Status.PodIPs, p.Status.PodIP = m.freshAddrs(), ""
		m.tell("pod %s: addresses %v", name, p.Status.PodIPs)
	case 7, 8:
		p.Spec.Containers, p.Spec.InitContainers = m.containers()
		m.tell("pod %s: other ports: %v", name, p.Spec.Containers)
	case 9:
		p.Status.HostIPs = choose(m.Rand, pods).Status.HostIPs
		m.tell("pod %s: on node %v", name, p.Status.HostIPs)
	case 10:
		p.Status.Phase = choose(m.Rand, []corev1.PodPhase{corev1.PodPending, corev1.PodRunning, corev1.PodSucceeded, corev1.PodFailed})
		m.tell("pod %s: %s", name, p.Status.Phase)
	case 11: // the address of a pod that goes is used again at once, in either order of events
		j := m.IntN(len(pods))
		if i == j || p.Spec.HostNetwork || pods[j].Spec.HostNetwork {
			return nil
		}
		q := pods[j].DeepCopy()
		p.Status.PodIPs, p.Status.PodIP = q.Status.PodIPs, ""
		q.Status.PodIPs, q.Status.PodIP = m.freshAddrs(), ""
		m.tell("pod %s gets the addresses of %s, which gets %v", name, key(q), q.Status.PodIPs)
		m.Objects.Pods = slices.Clone(pods)
		m.Objects.Pods[i], m.Objects.Pods[j] = p, q
		es := []event{{p, false}, {q, false}}
		if m.chance(50) {
			slices.Reverse(es)
		}
		return es
	case 12: // two claim one address for a time
		j := m.IntN(len(pods))
		if i == j || p.Spec.HostNetwork || pods[j].Spec.HostNetwork {
			return nil
		}
		m.tell("pod %s has the addresses of %s for a moment", name, key(pods[j]))
		p.Status.PodIPs, p.Status.PodIP = pods[j].Status.PodIPs, ""
		return []event{{p, false}, {pods[i], false}}
	default:
		k := choose(m.Rand, []string{"app", "tier", "app", "tier", "statefulset.kubernetes.io/pod-name", "pod-template-hash"})
		if m.chance(25) {
			p.Labels = maps.Clone(p.Labels)
			delete(p.Labels, k)
		} else {
			p.Labels = with(p.Labels, k, choose(m.Rand, []string{"a", "b", "", "pod0", "pod1", "r1", "r2"}))
		}
		m.tell("pod %s: labels %v", name, p.Labels)
	}
	m.Objects.Pods = slices.Clone(pods)
	m.Objects.Pods[i] = p
	return []event{{p, false}}
}

func (m *mutant) containers() (containers, inits []corev1.Container) {
	p := choose(m.Rand, m.donor().Objects.Pods)
	return p.Spec.Containers, p.Spec.InitContainers
}

func (m *mutant) changePolicy() []event {
	all := m.Objects.NetworkPolicies
	np := choose(m.Rand, m.donor().Objects.NetworkPolicies).DeepCopy()
	np.Namespace = choose(m.Rand, m.Objects.Namespaces).Name
	if m.chance(5) {
		np.Annotations = map[string]string{policy.PolicyModeAnnotation: "audit"} // a problem, and enforced all the same
	}
	if len(all) == 0 || len(all) < 12 && m.chance(30) {
		m.made++
		np.Name = fmt.Sprintf("new%d", m.made)
		m.tell("policy %s/%s comes", np.Namespace, np.Name)
		m.Objects.NetworkPolicies = append(slices.Clone(all), np)
		return []event{{np, false}}
	}
	i := m.IntN(len(all))
	if m.chance(30) {
		m.tell("policy %s/%s goes", all[i].Namespace, all[i].Name)
		m.Objects.NetworkPolicies = slices.Delete(slices.Clone(all), i, i+1)
		return []event{{all[i], true}}
	}
	np.Namespace, np.Name = all[i].Namespace, all[i].Name
	m.tell("policy %s/%s changes", np.Namespace, np.Name)
	m.Objects.NetworkPolicies = slices.Clone(all)
	m.Objects.NetworkPolicies[i] = np
	return []event{{np, false}}
}

// serviceAddrs is how many cluster IPs there are.
const serviceAddrs = 3

var servicePorts = []int32{80, 81}

func serviceAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 96, 0, byte(1 + i)}) }

// changeService changes one of three services, each with its own cluster IP, or one of their slices. Selectors are not followed
// here: whose addresses a slice holds is left to chance.
func (m *mutant) changeService() []event {
	n := m.IntN(serviceAddrs)
	name := fmt.Sprintf("svc%d", n)
	meta := metav1.ObjectMeta{Namespace: m.Objects.Namespaces[0].Name, Name: name}
	if m.chance(50) {
		s := &corev1.Service{ObjectMeta: meta, Spec: corev1.ServiceSpec{ClusterIPs: []string{serviceAddr(n).String()}}}
		i := slices.IndexFunc(m.Objects.Services, func(s *corev1.Service) bool { return s.Name == name })
		if i >= 0 {
			m.Objects.Services = slices.Delete(slices.Clone(m.Objects.Services), i, i+1)
			if m.chance(40) {
				m.tell("service %s goes", name)
				return []event{{s, true}}
			}
		}
		for _, p := range servicePorts {
			if m.chance(70) {
				s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: fmt.Sprint("p", p), Port: p})
			}
		}
		m.tell("service %s: ports %v", name, s.Spec.Ports)
		m.Objects.Services = append(slices.Clone(m.Objects.Services), s)
		return []event{{s, false}}
	}
	return m.changeSlice(name, meta)
}

func (m *mutant) changeSlice(service string, meta metav1.ObjectMeta) []event {
	meta.Name = fmt.Sprint("slice", m.IntN(4)) // a slice may change its service
	s := &discoveryv1.EndpointSlice{ObjectMeta: meta, AddressType: discoveryv1.AddressTypeIPv4}
	s.Labels = map[string]string{discoveryv1.LabelServiceName: service}
	i := slices.IndexFunc(m.Objects.EndpointSlices, func(o *discoveryv1.EndpointSlice) bool { return o.Name == s.Name })
	if i >= 0 {
		old := m.Objects.EndpointSlices[i]
		m.Objects.EndpointSlices = slices.Delete(slices.Clone(m.Objects.EndpointSlices), i, i+1)
		if m.chance(30) {
			m.tell("endpoint slice %s goes", s.Name)
			return []event{{old, true}}
		}
	}
	for _, p := range servicePorts {
		name, port := fmt.Sprint("p", p), choose(m.Rand, []int32{80, 8080})
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port})
	}
	for _, p := range m.Objects.Pods {
		for _, a := range oracle.Addresses(p) {
			if a.Is4() && m.chance(30) {
				ready := m.chance(80)
				s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
			}
		}
	}
	m.tell("endpoint slice %s: %d endpoints of %s", s.Name, len(s.Endpoints), service)
	m.Objects.EndpointSlices = append(slices.Clone(m.Objects.EndpointSlices), s)
	return []event{{s, false}}
}
