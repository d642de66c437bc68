package oracle

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
)

// Size bounds a generated World; each is a greatest number.
type Size struct{ Namespaces, Pods, Policies int }

// Small is the size at which nearly every corner comes up and a failure is still legible.
var Small = Size{Namespaces: 4, Pods: 14, Policies: 10}

// The addresses of a generated World. The first node lies in the pod network, as a CNI's bridge address does, the second outside.
var (
	podNetwork = []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16"), netip.MustParsePrefix("fd00:10:64::/64")}
	nodes      = []*corev1.Node{node("node-0", "10.64.0.1", "fd00:10:64::1"), node("node-1", "172.18.0.3", "fd00:172:18::3")}
)

// The alphabets are tiny so that selectors match, ports meet and ranges overlap often.
var (
	labelKeys   = []string{"app", "tier"}
	labelValues = []string{"a", "b", "c", ""}
	portNumbers = []int32{53, 80, 81, 82, 443, 8080, 8081}
	portNames   = []string{"web", "dns", "admin"}
	protocols   = []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}
)

const (
	volatileName = "statefulset.kubernetes.io/pod-name" // one value per pod
	volatileHash = "pod-template-hash"                  // one value per revision
)

// Generate makes a random World. Equal random sources give equal Worlds.
func Generate(r *rand.Rand, size Size) World {
	g := generator{Rand: r}
	g.PodNetwork = podNetwork
	g.Mode = pick(g.Rand, []verdict.Mode{verdict.Permissive, verdict.Strict})
	g.Objects.Nodes = nodes
	for i := range 1 + g.IntN(size.Namespaces) {
		g.namespace(i)
	}
	for want := 2 + g.IntN(size.Pods-1); len(g.Objects.Pods) < want; {
		g.workload(want - len(g.Objects.Pods))
	}
	for i := range g.IntN(size.Policies + 1) {
		g.policy(i)
	}
	return g.World
}

type generator struct {
	World
	*rand.Rand
}

func (g *generator) chance(percent int) bool { return g.IntN(100) < percent }

func pick[T any](r *rand.Rand, from []T) T { return from[r.IntN(len(from))] }

func node(name string, addresses ...string) *corev1.Node {
	n := &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, a := range addresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

func (g *generator) namespace(i int) {
	name := fmt.Sprintf("ns%d", i)
	ns := &corev1.Namespace{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelMetadataName: name}},
	}
	if g.chance(70) {
		ns.Labels["team"] = pick(g.Rand, labelValues)
	}
	if g.chance(50) {
		ns.Labels[policy.ModeLabel] = pick(g.Rand, []string{"permissive", "strict"})
	}
	g.Objects.Namespaces = append(g.Objects.Namespaces, ns)
}

// workload adds up to three pods that mostly share an identity, and sometimes differ in what an identity does not hold.
func (g *generator) workload(atMost int) {
	labels := map[string]string{}
	for _, k := range labelKeys {
		if g.chance(65) {
			labels[k] = pick(g.Rand, labelValues)
		}
	}
	namespace := pick(g.Rand, g.Objects.Namespaces).Name
	account := pick(g.Rand, []string{"", "default", "robot"})
	sidecar, stateful, hash := g.chance(75), g.chance(40), g.chance(40)
	onHost := !sidecar && g.chance(20)
	containers, inits := g.containers()
	for replica := range min(1+g.IntN(3), atMost) {
		i := len(g.Objects.Pods)
		pod := &corev1.Pod{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("pod%d", i), Namespace: namespace, Labels: maps.Clone(labels)},
			Spec:       corev1.PodSpec{ServiceAccountName: account, HostNetwork: onHost, Containers: containers, InitContainers: inits},
			Status:     corev1.PodStatus{Phase: corev1.PodRunning},
		}
		if stateful {
			pod.Labels[volatileName] = fmt.Sprintf("pod%d", replica) // the same few values in every workload, so that selectors hit
		}
		if hash {
			pod.Labels[volatileHash] = pick(g.Rand, []string{"r1", "r2"})
		}
		if g.chance(25) {
			pod.Spec.Containers, pod.Spec.InitContainers = g.containers()
		}
		if sidecar && g.chance(92) { // now and then one replica is from before the injection
			pod.Annotations = map[string]string{policy.SidecarAnnotation: policy.SidecarInjected}
		}
		g.place(pod, i)
		g.Objects.Pods = append(g.Objects.Pods, pod)
	}
}

// place puts a pod on a node and gives it addresses.
func (g *generator) place(pod *corev1.Pod, i int) {
	home := nodes[0]
	if g.chance(25) {
		home = nodes[1]
	}
	pod.Spec.NodeName = home.Name
	for _, a := range home.Status.Addresses {
		pod.Status.HostIPs = append(pod.Status.HostIPs, corev1.HostIP{IP: a.Address})
		if pod.Spec.HostNetwork {
			pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: a.Address})
		}
	}
	if !pod.Spec.HostNetwork {
		v4 := corev1.PodIP{IP: fmt.Sprintf("10.64.%d.%d", i%2, 10+i)}
		v6 := corev1.PodIP{IP: netip.MustParseAddr(fmt.Sprintf("fd00:10:64::%x:%x", i%2, 16+i)).String()}
		switch {
		case g.chance(15):
			pod.Status.PodIPs = []corev1.PodIP{v4}
		case g.chance(15):
			pod.Status.PodIPs = []corev1.PodIP{v6}
		default:
			pod.Status.PodIPs = []corev1.PodIP{v4, v6}
		}
	}
	pod.Status.HostIP, pod.Status.PodIP = pod.Status.HostIPs[0].IP, pod.Status.PodIPs[0].IP
}

// containers makes one or two containers and sometimes an init container, which serves only if it restarts always. Within one pod
// a name stands for one port of a protocol: which of two would count the API does not say.
func (g *generator) containers() (containers, inits []corev1.Container) {
	used := map[string]bool{}
	container := func(name string) corev1.Container {
		c := corev1.Container{Name: name, Image: "app"}
		for range g.IntN(4) {
			p := corev1.ContainerPort{ContainerPort: pick(g.Rand, portNumbers), Protocol: pick(g.Rand, protocols)}
			if p.Protocol == corev1.ProtocolTCP && g.chance(50) {
				p.Protocol = ""
			}
			if g.chance(70) {
				p.Name = pick(g.Rand, portNames)
			}
			protocol := p.Protocol
			if protocol == "" {
				protocol = corev1.ProtocolTCP
			}
			if key := p.Name + "/" + string(protocol); p.Name == "" || !used[key] {
				used[key] = true
				c.Ports = append(c.Ports, p)
			}
		}
		return c
	}
	containers = []corev1.Container{container("app")}
	if g.chance(30) {
		containers = append(containers, container("second"))
	}
	if g.chance(25) {
		c := container("init")
		if always := corev1.ContainerRestartPolicyAlways; g.chance(60) {
			c.RestartPolicy = &always
		}
		inits = []corev1.Container{c}
	}
	return containers, inits
}
