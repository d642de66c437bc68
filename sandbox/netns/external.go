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

// AddExternal makes an outside. Its probe server calls itself by the CIDR, and it comes from the first address of it when a probe does
// not say otherwise.
func (n *Network) AddExternal(ctx context.Context, spec ExternalSpec) (*External, error) {
	if !spec.Prefix.IsValid() || spec.Prefix != spec.Prefix.Masked() || spec.Prefix.Addr().Is4In6() {
		return nil, fmt.Errorf("add an outside for %s: give a CIDR without host bits", spec.Prefix)
	}
	name := spec.Prefix.String()
	if err := (PodSpec{Namespace: "external", Name: name, IPs: []netip.Addr{firstAddress(spec.Prefix)}, Ports: spec.Ports}).check(); err != nil {
		return nil, fmt.Errorf("add an outside for %s: %w", name, err)
	}
	spec.Ports = slices.Clone(spec.Ports)
	e := &External{host: host{network: n, name: name}, spec: spec}
	err := n.add(ctx, &e.host, nil, func() error {
		return apply(n.config.Logger, everywhere, ofApps(spec.Ports), ofOutside)
	}, func() error {
		return errors.Join(linkInner([]netip.Addr{firstAddress(spec.Prefix)}), answerFor(spec.Prefix))
	}, func() error {
		return linkOutside(e.link, spec.Prefix, n.config.Node4, n.config.Node6)
	}, spec.Ports)
	if err != nil {
		return nil, fmt.Errorf("add an outside for %s: %w", name, err)
	}
	return e, nil
}

// firstAddress is the first one of a CIDR that can be a host's.
func firstAddress(p netip.Prefix) netip.Addr {
	if p.IsSingleIP() {
		return p.Addr()
	}
	return p.Addr().Next()
}

// Close takes the outside away.
func (e *External) Close() error { return e.network.remove(&e.host, nil) }
