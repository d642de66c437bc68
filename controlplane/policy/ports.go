package policy

import (
	"fmt"
	"iter"
	"slices"
	"sort"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/mantlet/mantlet/verdict"
)

// portSet is a set of ports of each protocol: sorted ranges that neither overlap nor touch.
type portSet [verdict.SCTP + 1][]verdict.PortRange

func (s *portSet) add(p verdict.Protocol, r verdict.PortRange) {
	s[p] = normalize(append(slices.Clone(s[p]), r))
}

func (s *portSet) union(o *portSet) {
	for _, p := range verdict.Protocols {
		if len(o[p]) > 0 {
			s[p] = normalize(append(slices.Clone(s[p]), o[p]...))
		}
	}
}

func (s *portSet) has(p verdict.Protocol, port uint16) bool {
	i := sort.Search(len(s[p]), func(i int) bool { return s[p][i].Last >= port })
	return i < len(s[p]) && s[p][i].First <= port
}

func normalize(rs []verdict.PortRange) []verdict.PortRange {
	slices.SortFunc(rs, func(a, b verdict.PortRange) int { return int(a.First) - int(b.First) })
	out := rs[:0]
	for _, r := range rs {
		if n := len(out); n > 0 && int(r.First) <= int(out[n-1].Last)+1 {
			out[n-1].Last = max(out[n-1].Last, r.Last)
			continue
		}
		out = append(out, r)
	}
	return out
}

// everyPort is shared by all rules without ports, and must not be changed.
var everyPort = &portSet{
	verdict.TCP: {verdict.AllPorts}, verdict.UDP: {verdict.AllPorts}, verdict.SCTP: {verdict.AllPorts},
}

// namedPort is a port of a pod that has a name.
type namedPort struct {
	name     string
	protocol verdict.Protocol
	number   uint16
}

// namedPorts lists the named ports of a pod, sorted. Init containers count where they run as long as the pod does.
func namedPorts(spec *corev1.PodSpec) []namedPort {
	var out []namedPort
	for c := range lasting(spec) {
		for _, p := range c.Ports {
			proto, err := verdict.ParseProtocol(string(p.Protocol))
			if p.Name == "" || err != nil || p.ContainerPort < 1 || p.ContainerPort > 65535 {
				continue
			}
			out = append(out, namedPort{p.Name, proto, uint16(p.ContainerPort)})
		}
	}
	slices.SortFunc(out, func(a, b namedPort) int {
		if c := strings.Compare(a.name, b.name); c != 0 {
			return c
		}
		if a.protocol != b.protocol {
			return int(a.protocol) - int(b.protocol)
		}
		return int(a.number) - int(b.number)
	})
	return slices.Compact(out)
}

// lasting ranges over the containers that run as long as the pod does.
func lasting(spec *corev1.PodSpec) iter.Seq[*corev1.Container] {
	return func(yield func(*corev1.Container) bool) {
		for i := range spec.Containers {
			if !yield(&spec.Containers[i]) {
				return
			}
		}
		for i := range spec.InitContainers {
			c := &spec.InitContainers[i]
			if deref(c.RestartPolicy) == corev1.ContainerRestartPolicyAlways && !yield(c) {
				return
			}
		}
	}
}

// rulePorts is the ports list of one rule.
type rulePorts struct {
	fixed *portSet // numbers, ranges, and whole protocols
	named []namedRef
	words []string // in the order of the list
}

type namedRef struct {
	name     string
	protocol verdict.Protocol
}

// parsePorts reads the ports of a rule; no ports at all means every port (NetworkPolicyIngressRule.ports). The caller has
// validated them: what cannot be read admits nothing.
func parsePorts(ports []networkingv1.NetworkPolicyPort) rulePorts {
	if len(ports) == 0 {
		return rulePorts{fixed: everyPort, words: []string{"any port"}}
	}
	rp := rulePorts{fixed: &portSet{}}
	for _, p := range ports {
		proto := verdict.TCP
		if p.Protocol != nil {
			var err error
			if proto, err = verdict.ParseProtocol(string(*p.Protocol)); err != nil {
				continue
			}
		}
		switch {
		case p.Port == nil && p.EndPort == nil:
			rp.fixed.add(proto, verdict.AllPorts)
			rp.words = append(rp.words, "any "+proto.String()+" port")
		case p.Port == nil:
			continue
		case p.Port.Type == intstr.String:
			if p.EndPort != nil || p.Port.StrVal == "" {
				continue
			}
			rp.named = append(rp.named, namedRef{p.Port.StrVal, proto})
			rp.words = append(rp.words, p.Port.StrVal+"/"+proto.String())
		default:
			last := p.Port.IntVal
			if p.EndPort != nil {
				last = *p.EndPort
			}
			if p.Port.IntVal < 1 || last > 65535 || last < p.Port.IntVal {
				continue
			}
			r := verdict.PortRange{First: uint16(p.Port.IntVal), Last: uint16(last)}
			rp.fixed.add(proto, r)
			rp.words = append(rp.words, r.String()+"/"+proto.String())
		}
	}
	return rp
}

// describe writes the ports for people, and what the names among them mean at a pod.
func (rp *rulePorts) describe(pod []namedPort) string {
	text := strings.Join(rp.words, ", ")
	for _, ref := range rp.named {
		for _, np := range pod {
			if np.name == ref.name && np.protocol == ref.protocol {
				text += fmt.Sprintf(" (%s is %d)", np.name, np.number)
			}
		}
	}
	return text
}

// at resolves the ports against the pod whose ports they are.
func (rp *rulePorts) at(pod []namedPort) *portSet {
	if len(rp.named) == 0 {
		return rp.fixed
	}
	s := &portSet{}
	s.union(rp.fixed)
	for _, ref := range rp.named {
		for _, np := range pod {
			if np.name == ref.name && np.protocol == ref.protocol {
				s.add(np.protocol, verdict.PortRange{First: np.number, Last: np.number})
			}
		}
	}
	return s
}

// namesOneOf reports whether the rule names a port that the pod has.
func (rp *rulePorts) namesOneOf(pod []namedPort) bool {
	for _, ref := range rp.named {
		for _, np := range pod {
			if np.name == ref.name && np.protocol == ref.protocol {
				return true
			}
		}
	}
	return false
}
