// Package matrix says who reaches whom: the attempts worth making in a set of manifests, what becomes of each, and how that is
// shown. `mantlet simulate` fills it from the evaluator, `mantlet sandbox` from real packets; both write the same report.
//
//	manifests ──Plan──► []Attempt ──┬─ Simulate (policy.Index) ─┐
//	                                └─ sandbox (real packets) ──┴─► Report ──► table, JSON, YAML
package matrix

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
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

// External is a range of addresses outside the cluster, with the port that is tried there.
type External struct {
	Prefix netip.Prefix
	Port   uint16
}

// DefaultExternalPort is tried where an external range names no port.
const DefaultExternalPort = 443

// ParseExternal reads "203.0.113.0/24", "203.0.113.0/24:8443", "[2001:db8::/64]:443". A bare address is a range of one.
func ParseExternal(s string) (External, error) {
	e := External{Port: DefaultExternalPort}
	cidr := s
	if rest, ok := strings.CutPrefix(s, "["); ok {
		inner, after, closed := strings.Cut(rest, "]")
		if !closed {
			return External{}, fmt.Errorf("external %q: the bracket is not closed", s)
		}
		cidr = inner
		if after != "" {
			port, err := ParsePort(strings.TrimPrefix(after, ":"))
			if err != nil || !strings.HasPrefix(after, ":") || port.Protocol != verdict.TCP {
				return External{}, fmt.Errorf("external %q: want [CIDR]:PORT", s)
			}
			e.Port = port.Number
		}
	} else if i := strings.LastIndex(s, ":"); i >= 0 && strings.Count(s, ":") == 1 {
		port, err := ParsePort(s[i+1:])
		if err != nil || port.Protocol != verdict.TCP {
			return External{}, fmt.Errorf("external %q: want CIDR or CIDR:PORT", s)
		}
		cidr, e.Port = s[:i], port.Number
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

// Attempt is one connection to make.
type Attempt struct {
	From string // "namespace/pod"
	To   string // "namespace/pod", "namespace/service", or the external range
	Via  Via
	Addr netip.AddrPort
}

// ServerFirstAnnotation on a pod lists the ports ("5432,6379") on which the probe server speaks first; "true" means all.
const ServerFirstAnnotation = "mantlet.dev/server-first"

// Listener is a TCP port of a pod.
type Listener struct {
	Port        uint16
	ServerFirst bool
}

// Listeners lists the TCP ports that a pod declares and the extra ones, in order.
func Listeners(p *corev1.Pod, extra []Port) ([]Listener, error) {
	var out []Listener
	add := func(port uint16) {
		if !slices.ContainsFunc(out, func(l Listener) bool { return l.Port == port }) {
			out = append(out, Listener{Port: port})
		}
	}
	containers := func(cs []corev1.Container) {
		for _, c := range cs {
			for _, cp := range c.Ports {
				if proto, err := verdict.ParseProtocol(string(cp.Protocol)); err == nil && proto == verdict.TCP && cp.ContainerPort > 0 {
					add(uint16(cp.ContainerPort))
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
		if e.Protocol == verdict.TCP {
			add(e.Number)
		}
	}
	slices.SortFunc(out, func(a, b Listener) int { return int(a.Port) - int(b.Port) })
	first, ok := p.Annotations[ServerFirstAnnotation]
	if !ok {
		return out, nil
	}
	for _, word := range strings.Split(first, ",") {
		if word = strings.TrimSpace(word); word == "true" {
			for i := range out {
				out[i].ServerFirst = true
			}
			continue
		}
		port, err := ParsePort(word)
		i := slices.IndexFunc(out, func(l Listener) bool { return l.Port == port.Number })
		if err != nil || i < 0 {
			return nil, fmt.Errorf("pod %s/%s: annotation %s: %q is none of its TCP ports, and not \"true\"", p.Namespace, p.Name, ServerFirstAnnotation, word)
		}
		out[i].ServerFirst = true
	}
	return out, nil
}

// Options say what to try beyond what the manifests declare.
type Options struct {
	Ports    []Port
	External []External
}

// Plan lists all attempts: every pod to every port of every pod and service, in each family that both have, and to the external
// ranges. The order is that of the names.
func Plan(m *source.Manifests, o Options) ([]Attempt, error) {
	type target struct {
		to   string
		via  Via
		addr netip.AddrPort
	}
	var targets []target
	for _, p := range m.Objects.Pods {
		ls, err := Listeners(p, o.Ports)
		if err != nil {
			return nil, err
		}
		for _, l := range ls {
			for _, a := range PodAddrs(p) {
				targets = append(targets, target{p.Namespace + "/" + p.Name, ViaPod, netip.AddrPortFrom(a, l.Port)})
			}
		}
	}
	for _, s := range m.Objects.Services {
		if s.Spec.Type == corev1.ServiceTypeExternalName {
			continue
		}
		for _, p := range s.Spec.Ports {
			if proto, err := verdict.ParseProtocol(string(p.Protocol)); err != nil || proto != verdict.TCP {
				continue
			}
			for _, ip := range s.Spec.ClusterIPs {
				if a, err := netip.ParseAddr(ip); err == nil { // not "None"
					targets = append(targets, target{s.Namespace + "/" + s.Name, ViaService, netip.AddrPortFrom(a, uint16(p.Port))})
				}
			}
		}
	}
	for i, e := range o.External {
		if slices.Contains(o.External[:i], e) {
			return nil, fmt.Errorf("external %s:%d is given twice", e.Prefix, e.Port)
		}
		for _, n := range slices.Concat(m.PodNetwork, m.ServiceNetwork) {
			if n.Overlaps(e.Prefix) {
				return nil, fmt.Errorf("external %s overlaps the cluster's own network %s: it would not be outside", e.Prefix, n)
			}
		}
		targets = append(targets, target{e.Prefix.String(), ViaExternal, netip.AddrPortFrom(e.Host(), e.Port)})
	}
	var out []Attempt
	for _, p := range m.Objects.Pods {
		var v4, v6 bool
		for _, a := range PodAddrs(p) {
			v4, v6 = v4 || a.Is4(), v6 || a.Is6()
		}
		for _, t := range targets {
			if t.addr.Addr().Is4() && v4 || t.addr.Addr().Is6() && v6 {
				out = append(out, Attempt{From: p.Namespace + "/" + p.Name, To: t.to, Via: t.via, Addr: t.addr})
			}
		}
	}
	return out, nil
}

// PodAddrs lists a pod's addresses.
func PodAddrs(p *corev1.Pod) []netip.Addr {
	var out []netip.Addr
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out = append(out, a.Unmap())
		}
	}
	return out
}

// Simulate decides every attempt by the evaluator alone.
func Simulate(x *policy.Index, attempts []Attempt) *Report {
	r := &Report{Connections: make([]Connection, len(attempts))}
	for i, a := range attempts {
		r.Connections[i] = decide(x, a)
	}
	r.Summarize()
	return r
}

// decide says what the evaluator makes of an attempt. To a service it is what becomes of its endpoints: one that is admitted is
// enough, because the sidecar picks among those only. Without a sidecar the node picks one without asking any policy; then all
// have to be admitted for the connection to be called allowed.
func decide(x *policy.Index, a Attempt) Connection {
	c := Connection{From: a.From, To: a.To, Address: a.Addr.Addr().String(), Port: a.Addr.Port(), Protocol: verdict.TCP.String(), Via: a.Via}
	if a.Via != ViaService {
		c.fill(x.Answer(a.From, verdict.TCP, a.Addr))
		return c
	}
	d, _ := x.DestinationFor(a.From, verdict.TCP, a.Addr)
	if len(d.Endpoints) == 0 {
		c.fill(policy.Answer{Reason: verdict.Reason{Text: absence(d)}})
		return c
	}
	pod, _ := x.Pod(a.From)
	var allowed, denied []policy.Answer
	for _, e := range d.Endpoints {
		if ans := x.Answer(a.From, verdict.TCP, e.Addr); ans.Allowed {
			allowed = append(allowed, ans)
		} else {
			denied = append(denied, ans)
		}
	}
	if one := x.Admitted(a.From, d); pod.Sidecar && d.Sticky && len(one) > 0 {
		allowed = []policy.Answer{x.Answer(a.From, verdict.TCP, one[0].Addr)}
	}
	switch {
	case len(allowed) == 0:
		c.fill(denied[0])
	case len(denied) == 0 || pod.Sidecar:
		c.fill(allowed[0])
		// Authenticated only if whichever endpoint is picked proves itself.
		c.Authenticated = !slices.ContainsFunc(allowed, func(a policy.Answer) bool { return !a.Authenticated })
	default:
		c.fill(allowed[0])
		c.Partly = fmt.Sprintf("%d of %d endpoints are denied, and without a sidecar nothing steers around them", len(denied), len(d.Endpoints))
	}
	return c
}

// absence says why a destination has no endpoint for a client.
func absence(d policy.Destination) string {
	switch {
	case len(d.Others) == 0:
		return "the service has no endpoint"
	case d.Local:
		return "the service has no ready endpoint on the client's node (internalTrafficPolicy: Local)"
	}
	return "the service has no ready endpoint"
}

func (c *Connection) fill(a policy.Answer) {
	c.Verdict = Denied
	if a.Allowed {
		c.Verdict = Allowed
	}
	c.Authenticated = a.Authenticated
	c.Reason = a.Reason
}
