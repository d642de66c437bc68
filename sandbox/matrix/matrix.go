// Package matrix says who reaches whom: the attempts worth making in a set of manifests, what becomes of each, and how that is
// shown. `mantlet simulate` fills it from the evaluator, `mantlet sandbox` from real packets; both write the same report.
//
//	manifests ──Plan──► []Attempt ──┬─ Simulate (policy.Index) ─┐
//	                                └─ sandbox (real packets) ──┴─► Report ──► table, JSON, YAML
package matrix

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/verdict"
)

// Via says what kind of destination a connection was made to.
type Via string

// The kinds of destinations.
const (
	ViaPod      Via = "pod"
	ViaService  Via = "service"
	ViaExternal Via = "external"
)

// Port is a port with its protocol.
type Port struct {
	Number   uint16
	Protocol verdict.Protocol
}

// ParsePort reads "80", "80/TCP".
func ParsePort(s string) (Port, error) {
	number, proto, _ := strings.Cut(s, "/")
	var n int
	if _, err := fmt.Sscanf(number, "%d", &n); err != nil || fmt.Sprint(n) != number || n < 1 || n > 65535 {
		return Port{}, fmt.Errorf("port %q: want a number from 1 to 65535, or NUMBER/PROTOCOL", s)
	}
	p, err := verdict.ParseProtocol(proto)
	if err != nil {
		return Port{}, fmt.Errorf("port %q: %w", s, err)
	}
	return Port{uint16(n), p}, nil
}

// String writes "80", "53/UDP": TCP goes without saying, as in the Kubernetes API.
func (p Port) String() string {
	if p.Protocol == 0 || p.Protocol == verdict.TCP {
		return fmt.Sprint(p.Number)
	}
	return fmt.Sprintf("%d/%s", p.Number, p.Protocol)
}

// External is a range of addresses outside the cluster, with the port that is tried there.
type External struct {
	Prefix   netip.Prefix
	Port     uint16
	Protocol verdict.Protocol
}

// DefaultExternalPort is tried where an external range names no port.
const DefaultExternalPort = 443

// ParseExternal reads "203.0.113.0/24", "203.0.113.0/24:8443", "203.0.113.0/24:53/UDP", "[2001:db8::/64]:443". A bare address is a range
// of one.
func ParseExternal(s string) (External, error) {
	e := External{Port: DefaultExternalPort, Protocol: verdict.TCP}
	cidr := s
	if rest, ok := strings.CutPrefix(s, "["); ok {
		inner, after, closed := strings.Cut(rest, "]")
		if !closed {
			return External{}, fmt.Errorf("external %q: the bracket is not closed", s)
		}
		cidr = inner
		if after != "" {
			port, err := ParsePort(strings.TrimPrefix(after, ":"))
			if err != nil || !strings.HasPrefix(after, ":") {
				return External{}, fmt.Errorf("external %q: want [CIDR]:PORT or [CIDR]:PORT/PROTOCOL", s)
			}
			e.Port, e.Protocol = port.Number, port.Protocol
		}
	} else if i := strings.LastIndex(s, ":"); i >= 0 && strings.Count(s, ":") == 1 {
		port, err := ParsePort(s[i+1:])
		if err != nil {
			return External{}, fmt.Errorf("external %q: want CIDR, CIDR:PORT or CIDR:PORT/PROTOCOL", s)
		}
		cidr, e.Port, e.Protocol = s[:i], port.Number, port.Protocol
	}
	if a, err := netip.ParseAddr(cidr); err == nil && a.Zone() == "" {
		e.Prefix = netip.PrefixFrom(a, a.BitLen())
	} else if e.Prefix, err = netip.ParsePrefix(cidr); err != nil {
		return External{}, fmt.Errorf("external %q: want CIDR or CIDR:PORT, for example 203.0.113.0/24:443", s)
	}
	e.Prefix = e.Prefix.Masked()
	if a := e.Host(); !a.IsGlobalUnicast() || a.Is4In6() {
		return External{}, fmt.Errorf("external %q: %s is no address of a host outside: want a range of unicast addresses", s, a)
	}
	return e, nil
}

// Host is the address that is tried: the first one after the network's own.
func (e External) Host() netip.Addr {
	if e.Prefix.IsSingleIP() {
		return e.Prefix.Addr()
	}
	return e.Prefix.Addr().Next()
}

// Attempt is one connection to make, or one exchange of datagrams.
type Attempt struct {
	From     string // "namespace/pod"
	To       string // "namespace/pod", "namespace/service", or the external range
	Via      Via
	Addr     netip.AddrPort
	Protocol verdict.Protocol
}

// ServerFirstAnnotation on a pod lists the TCP ports ("5432,6379") on which the probe server speaks first; "true" means all.
const ServerFirstAnnotation = "mantlet.dev/server-first"

// Listener is a port of a pod.
type Listener struct {
	Port        uint16
	Protocol    verdict.Protocol
	ServerFirst bool // TCP only
}

// Listeners lists the ports that a pod declares and the extra ones, in order.
func Listeners(p *corev1.Pod, extra []Port) ([]Listener, error) {
	var out []Listener
	add := func(port uint16, proto verdict.Protocol) {
		if !slices.ContainsFunc(out, func(l Listener) bool { return l.Port == port && l.Protocol == proto }) {
			out = append(out, Listener{Port: port, Protocol: proto})
		}
	}
	containers := func(cs []corev1.Container) {
		for _, c := range cs {
			for _, cp := range c.Ports {
				if proto, err := verdict.ParseProtocol(string(cp.Protocol)); err == nil && cp.ContainerPort > 0 {
					add(uint16(cp.ContainerPort), proto)
				}
			}
		}
	}
	containers(p.Spec.Containers)
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			containers([]corev1.Container{c})
		}
	}
	for _, e := range extra {
		add(e.Number, e.Protocol)
	}
	slices.SortFunc(out, func(a, b Listener) int {
		return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol))
	})
	first, ok := p.Annotations[ServerFirstAnnotation]
	if !ok {
		return out, nil
	}
	for _, word := range strings.Split(first, ",") {
		if word = strings.TrimSpace(word); word == "true" {
			for i := range out {
				out[i].ServerFirst = out[i].Protocol == verdict.TCP
			}
			continue
		}
		port, err := ParsePort(word)
		i := slices.IndexFunc(out, func(l Listener) bool { return l.Port == port.Number && l.Protocol == verdict.TCP })
		if err != nil || i < 0 {
			return nil, fmt.Errorf("pod %s/%s: annotation %s: %q is none of its TCP ports, and not \"true\"", p.Namespace, p.Name, ServerFirstAnnotation, word)
		}
		out[i].ServerFirst = true
	}
	return out, nil
}
