package netns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// ExternalSpec is a piece of the world outside the cluster.
type ExternalSpec struct {
	// Prefix is the CIDR that it answers for, every address of it. Pods and more specific outsides within keep their addresses.
	Prefix netip.Prefix
	Ports  []Port
}

// External is the network namespace that plays the outside for a CIDR. Probes from it give Target.From an address of the CIDR.
type External struct {
	host
	spec ExternalSpec
}

// Spec is what the outside was made from.
func (e *External) Spec() ExternalSpec { return e.spec }

// AddExternal makes an outside. Its probe server calls itself by the CIDR. Probes from it that do not say otherwise come from the CIDR's
// first address, or from 192.0.2.1 or 2001:db8::1 where that is in the CIDR.
func (n *Network) AddExternal(ctx context.Context, spec ExternalSpec) (*External, error) {
	if !spec.Prefix.IsValid() || spec.Prefix != spec.Prefix.Masked() || spec.Prefix.Addr().Is4In6() {
		return nil, fmt.Errorf("add an outside for %s: give a CIDR without host bits", spec.Prefix)
	}
	name := spec.Prefix.String()
	if err := (PodSpec{Namespace: "external", Name: name, IPs: []netip.Addr{spec.own()}, Ports: spec.Ports}).check(); err != nil {
		return nil, fmt.Errorf("add an outside for %s: %w", name, err)
	}
	spec.Ports = slices.Clone(spec.Ports)
	e := &External{host: host{network: n, name: name}, spec: spec}
	err := n.add(ctx, &e.host, nil, func() error {
		return apply(n.config.Logger, everywhere, ofApps(spec.Ports), ofOutside)
	}, func() error {
		return errors.Join(linkInner([]netip.Addr{spec.own()}), answerFor(spec.Prefix))
	}, func() error {
		return linkOutside(e.link, spec.Prefix, n.config.Node4, n.config.Node6)
	}, spec.Ports)
	if err != nil {
		return nil, fmt.Errorf("add an outside for %s: %w", name, err)
	}
	return e, nil
}

// own is the address that an outside comes from: the documentation address if the CIDR holds it, as 0.0.0.0/0 does, whose first address
// is nobody's; else the first one.
func (s ExternalSpec) own() netip.Addr {
	for _, documentation := range []string{"192.0.2.1", "2001:db8::1"} {
		if a := netip.MustParseAddr(documentation); s.Prefix.Contains(a) {
			return a
		}
	}
	if s.Prefix.IsSingleIP() {
		return s.Prefix.Addr()
	}
	return s.Prefix.Addr().Next()
}

// Close takes the outside away.
func (e *External) Close() error { return e.network.remove(&e.host, nil) }
