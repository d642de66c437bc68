package matrix

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/verdict"
)

// Options say what to try beyond what the manifests declare.
type Options struct {
	Ports    []Port
	External []External
}

// Plan lists all attempts: every pod to every port of every pod and service, at all of its addresses, in each family that both have, and to the
// external ranges. The order is that of the names.
func Plan(m *source.Manifests, o Options) ([]Attempt, error) {
	type target struct {
		to    string
		via   Via
		addr  netip.AddrPort
		proto verdict.Protocol
	}
	var targets []target
	x := policy.NewIndex(policy.Config{}) // knows whose an address is that several services claim
	if err := x.ApplyAll(&policy.Objects{Services: m.Objects.Services}); err != nil {
		return nil, err
	}
	pods := map[netip.Addr]bool{}
	for _, p := range m.Objects.Pods {
		for _, a := range PodAddrs(p) {
			pods[a] = !p.Spec.HostNetwork
		}
	}
	for _, p := range m.Objects.Pods {
		ls, err := Listeners(p, o.Ports)
		if err != nil {
			return nil, err
		}
		for _, l := range ls {
			for _, a := range PodAddrs(p) {
				targets = append(targets, target{p.Namespace + "/" + p.Name, ViaPod, netip.AddrPortFrom(a, l.Port), l.Protocol})
			}
		}
	}
	for _, s := range m.Objects.Services {
		if s.Spec.Type == corev1.ServiceTypeExternalName {
			continue
		}
		for _, p := range s.Spec.Ports {
			proto, err := verdict.ParseProtocol(string(p.Protocol))
			if err != nil {
				continue
			}
			name := s.Namespace + "/" + s.Name
			for _, a := range slices.Concat(x.ServiceAddrs(name), x.ServiceExternalAddrs(name)) {
				at := netip.AddrPortFrom(a, uint16(p.Port))
				if d, _ := x.Destination(proto, at); d.Service == name && !pods[a] {
					targets = append(targets, target{name, ViaService, at, proto})
				}
			}
		}
	}
	for i, e := range o.External {
		if slices.Contains(o.External[:i], e) {
			return nil, fmt.Errorf("external %s:%s is given twice", e.Prefix, Port{e.Port, e.Protocol})
		}
		for _, n := range slices.Concat(m.PodNetwork, m.ServiceNetwork) {
			if n.Overlaps(e.Prefix) {
				return nil, fmt.Errorf("external %s overlaps the cluster's own network %s: it would not be outside", e.Prefix, n)
			}
		}
		if d, _ := x.Destination(e.Protocol, netip.AddrPortFrom(e.Host(), e.Port)); d.Service != "" {
			return nil, fmt.Errorf("external %s:%s is an address of service %s: it would not be outside", e.Prefix, Port{e.Port, e.Protocol}, d.Service)
		}
		targets = append(targets, target{e.Prefix.String(), ViaExternal, netip.AddrPortFrom(e.Host(), e.Port), e.Protocol})
	}
	var out []Attempt
	for _, p := range m.Objects.Pods {
		var v4, v6 bool
		for _, a := range PodAddrs(p) {
			v4, v6 = v4 || a.Is4(), v6 || a.Is6()
		}
		for _, t := range targets {
			if t.addr.Addr().Is4() && v4 || t.addr.Addr().Is6() && v6 {
				out = append(out, Attempt{From: p.Namespace + "/" + p.Name, To: t.to, Via: t.via, Addr: t.addr, Protocol: t.proto})
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
