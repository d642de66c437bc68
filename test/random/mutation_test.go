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
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/verdict"
)

var steps = flag.Int("steps", 60, "how many changes each world of the mutation test goes through")

// TestVerdictsFollowChanges changes objects in place: labels of namespaces and pods, addresses, ports, sidecars, nodes, whole policies,
// services and their endpoints; some come and go. After each change the index that followed all of them must say what a fresh one
// says, and its Deltas must have named whatever changed since verdicts were last read, packets included. What a world ends as is held against
// the oracle.
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
			named.Packets = append(named.Packets, d.Packets...)
			named.Addrs = append(named.Addrs, d.Addrs...)
			named.NodePorts = append(named.NodePorts, d.NodePorts...)
			named.HostPorts = append(named.HostPorts, d.HostPorts...)
			named.External = named.External || d.External
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
	external []netip.AddrPort
}

// podReading is what an index says of a pod.
type podReading struct {
	subject, hash, seen, packets string
	destinations                 string     // what cluster IPs stand for to it
	elsewhere                    [24]string // and elsewhere
	node, hostPorts              string     // what is asked about at the node
}

// read reads all pods. What others see of a pod is in it, too: who depends on that has to be told by name.
func read(x *policy.Index, pods []*corev1.Pod) reading {
	hashes := map[string]string{}
	for _, k := range x.SubjectKeys() { // also of pods that should not be there any more
		hashes[k] = x.Verdicts(k).Hash()
	}
	out := reading{map[string]podReading{}, map[netip.AddrPort]string{}, x.External()}
	for i := range serviceAddrs {
		for _, port := range servicePorts {
			to := netip.AddrPortFrom(serviceAddr(i), uint16(port))
			d, ok := x.Destination(verdict.TCP, to)
			out.services[to] = fmt.Sprint(ok, d.Local, d.Sticky, addresses(d.Endpoints), addresses(d.Others))
		}
	}
	for _, o := range pods {
		p, ok := x.Pod(key(o))
		if !ok {
			continue
		}
		r := podReading{subject: p.Subject.Key, hash: hashes[p.Subject.Key], seen: fmt.Sprint(p.UID, p.Subject.ID, p.Addrs, p.NodeIPs, p.Sidecar), packets: x.Packets(p.Name).Hash(),
			node: o.Spec.NodeName, hostPorts: fmt.Sprint(x.HostPorts(p.Name))}
		for i := range serviceAddrs {
			for _, port := range servicePorts {
				d, _ := x.DestinationFor(p.Name, verdict.TCP, netip.AddrPortFrom(serviceAddr(i), uint16(port)))
				r.destinations += fmt.Sprint(addresses(d.Endpoints))
			}
		}
		for i, to := range elsewhere() {
			d, _ := x.DestinationFor(p.Name, verdict.TCP, to)
			r.elsewhere[i] = fmt.Sprint(d.Service, addresses(d.Endpoints), d.Sources)
		}
		out.pods[p.Name] = r
	}
	return out
}

func addresses(endpoints []policy.Endpoint) (out []netip.AddrPort) {
	for _, e := range endpoints {
		out = append(out, e.Addr)
	}
	return out
}

// unnamed finds a change that no Delta named, and counts the changes that one did.
func unnamed(before, after reading, d policy.Delta) (n int, diff string) {
	if !d.External && !slices.Equal(before.external, after.external) {
		return n, fmt.Sprintf("external addresses were %v and are %v, and no delta says so", before.external, after.external)
	}
	for i := range serviceAddrs {
		for _, port := range servicePorts {
			to := netip.AddrPortFrom(serviceAddr(i), uint16(port))
			if before.services[to] != after.services[to] && len(d.Services) == 0 { // its own, or one that has the address for an external one
				return n, fmt.Sprintf("%s stood for %s and stands for %s, and no delta names a service", to, before.services[to], after.services[to])
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
		for i, to := range elsewhere() {
			if was, is := old.elsewhere[i], now.elsewhere[i]; is != was && len(d.Pods) == 0 && len(d.Services) == 0 && !slices.Contains(d.Addrs, to.Addr()) && !slices.Contains(d.NodePorts, to.Port()) {
				return n, fmt.Sprintf("to pod %s %s stood for %s and stands for %s, and no delta names a pod, a service, the address or the port", name, to, was, is)
			}
		}
		atNode := slices.ContainsFunc(d.HostPorts, func(p policy.HostPort) bool { return p.Node == now.node })
		switch {
		case old.hostPorts != now.hostPorts && !byPod && !atNode:
			return n, fmt.Sprintf("pod %s: host ports of its node %s were %s and are %s, and no delta names it or one of them", name, now.node, old.hostPorts, now.hostPorts)
		case (old.subject != now.subject || old.seen != now.seen) && !byPod:
			return n, fmt.Sprintf("pod %s changed from %+v to %+v, and no delta names it", name, old, now)
		case old.destinations != now.destinations && !byPod && len(d.Services) == 0:
			return n, fmt.Sprintf("to pod %s services stood for %s and stand for %s, and no delta names it or a service", name, old.destinations, now.destinations)
		case old.hash != now.hash && !byPod && !slices.Contains(d.Subjects, now.subject):
			return n, fmt.Sprintf("the verdicts of pod %s changed, and no delta names it or its subject %s", name, now.subject)
		case old.packets != now.packets && !slices.Contains(d.Packets, name):
			return n, fmt.Sprintf("the packets of pod %s changed, and no delta names it", name)
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
	speak    func(*rand.Rand, *networkingv1.NetworkPolicy) // what is made of new policies; nil: nothing
	protocol corev1.Protocol                               // of services; empty: TCP
	made     int
	story    []string
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
	if !slices.Equal(fresh.External(), x.External()) {
		return fmt.Sprintf("external addresses %v, and a fresh index has %v", x.External(), fresh.External())
	}
	if len(got) != len(want) || !slices.Equal(fresh.SubjectKeys(), x.SubjectKeys()) {
		return fmt.Sprintf("subjects %q, and a fresh index has %q", x.SubjectKeys(), fresh.SubjectKeys())
	}
	if !slices.Equal(fresh.Problems(), x.Problems()) {
		return fmt.Sprintf("problems %q, and a fresh index has %q", x.Problems(), fresh.Problems())
	}
	targets := elsewhere()
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
			a, _ := fresh.DestinationFor(key(p), verdict.TCP, to)
			b, known := x.DestinationFor(key(p), verdict.TCP, to)
			if got, want := x.Reach(key(p), verdict.TCP, to), x.Admitted(key(p), b); got.Known != known || !slices.Equal(got.Endpoints, want) {
				return fmt.Sprintf("%s is to %s what it is to a replica, %+v, but asked alone %+v (%t)", to, key(p), *got, want, known)
			}
			if fmt.Sprint(a, fresh.Admitted(key(p), a)) != fmt.Sprint(b, x.Admitted(key(p), b)) {
				return fmt.Sprintf("%s stands for %+v to %s, and a fresh index says %+v", to, b, key(p), a)
			}
			if a, b := fresh.Answer(key(p), verdict.TCP, to), x.Answer(key(p), verdict.TCP, to); a != b {
				return fmt.Sprintf("%s to %s: %+v, and a fresh index says %+v", key(p), to, b, a)
			}
		}
	}
	return ""
}
