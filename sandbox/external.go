package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/verdict"
)

// outside is who answers for a range outside the cluster.
type outside struct {
	*netns.External
	ports []netns.Port // sorted
}

// External is the network namespace that plays the outside for a CIDR, to run something in.
func (s *Sandbox) External(prefix netip.Prefix) (*netns.External, bool) {
	x, ok := s.outsides[prefix]
	return x.External, ok
}

// lead has services lead to where they do by the present manifests, and somebody answer there also outside the cluster.
func (s *Sandbox) lead(ctx context.Context) error {
	services := s.services()
	ports, err := s.outsidePorts(services)
	if err != nil {
		return err
	}
	for prefix, x := range s.outsides {
		if slices.Equal(x.ports, ports[prefix]) {
			continue
		}
		if err := x.Close(); err != nil {
			return err
		}
		delete(s.outsides, prefix)
	}
	for prefix, list := range ports {
		if _, there := s.outsides[prefix]; there {
			continue
		}
		x, err := s.network.AddExternal(ctx, netns.ExternalSpec{Prefix: prefix, Ports: list})
		if err != nil {
			return err
		}
		s.outsides[prefix] = outside{x, list}
	}
	return s.network.SetServices(services)
}

// outsidePorts are the ranges outside the cluster where somebody is to answer, and at which ports: those that are to be tried, and where services have
// endpoints that are no pod's.
func (s *Sandbox) outsidePorts(services []netns.Service) (map[netip.Prefix][]netns.Port, error) {
	ports := map[netip.Prefix][]netns.Port{}
	for _, e := range s.cfg.Options.External {
		proto, ok := carried(e.Protocol)
		switch {
		case ok:
			ports[e.Prefix] = append(ports[e.Prefix], netns.Port{Number: e.Port, Protocol: proto, Speaks: netns.ClientFirst})
		case e.Protocol != verdict.SCTP: // which Tried tells of
			return nil, fmt.Errorf("external %s: protocol %s cannot be tried", e.Prefix, e.Protocol)
		}
	}
	ranges := slices.Collect(maps.Keys(ports))
	for _, svc := range services {
		for _, at := range svc.Backends {
			addr := at.Addr()
			if slices.ContainsFunc(s.cfg.Manifests.PodNetwork, func(p netip.Prefix) bool { return p.Contains(addr) }) {
				continue
			}
			within := []netip.Prefix{netip.PrefixFrom(addr, addr.BitLen())}
			if given := slices.DeleteFunc(slices.Clone(ranges), func(r netip.Prefix) bool { return !r.Contains(addr) }); len(given) > 0 {
				within = given
			}
			for _, r := range within {
				ports[r] = append(ports[r], netns.Port{Number: at.Port(), Protocol: svc.Protocol, Speaks: netns.ClientFirst})
			}
		}
	}
	for prefix, list := range ports {
		slices.SortFunc(list, func(a, b netns.Port) int {
			return cmp.Or(cmp.Compare(a.Number, b.Number), cmp.Compare(a.Protocol, b.Protocol))
		})
		ports[prefix] = slices.Compact(list)
	}
	return ports, nil
}
