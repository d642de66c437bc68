package random

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
)

// change makes one change and returns its events.
func (m *mutant) change() []event {
	for {
		var es []event
		switch n := m.IntN(100); {
		case n < 10:
			es = m.changeNamespace()
		case n < 15:
			es = m.changeNode()
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
	switch m.IntN(17) {
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
	case 9, 13, 14:
		other := choose(m.Rand, pods)
		if p.Spec.NodeName = other.Spec.NodeName; m.chance(33) { // another node, behind the same addresses or not
			p.Status.HostIPs = other.Status.HostIPs
		}
		m.tell("pod %s: on node %s %v", name, p.Spec.NodeName, p.Status.HostIPs)
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
	p := choose(m.Rand, m.donor().Objects.Pods).DeepCopy()
	for _, list := range [][]corev1.Container{p.Spec.Containers, p.Spec.InitContainers} {
		for i := range list {
			for m.chance(40) {
				list[i].Ports = append(list[i].Ports, corev1.ContainerPort{Protocol: m.protocol, ContainerPort: choose(m.Rand, []int32{80, 8080}),
					HostPort: choose(m.Rand, []int32{80, 81, nodePorts[0]}), HostIP: choose(m.Rand, []string{"", "", "0.0.0.0", "::", "10.64.0.1", "172.18.0.3", "fd00:172:18::3", "198.51.100.1"})})
			}
		}
	}
	return p.Spec.Containers, p.Spec.InitContainers
}

func (m *mutant) changePolicy() []event {
	all := m.Objects.NetworkPolicies
	np := choose(m.Rand, m.donor().Objects.NetworkPolicies).DeepCopy()
	np.Namespace = choose(m.Rand, m.Objects.Namespaces).Name
	if m.speak != nil {
		m.speak(m.Rand, np)
	}
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
