package matcher

import (
	"fmt"
	"net/netip"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/proto"
)

// legacyChain chooses by the filter_chain_match of each chain. Envoy asks one question after the other, and each time keeps only the
// chains with the most specific answer that holds; it never goes back. A chain that leaves a question open is the least specific.
func legacyChain(l *listenerv3.Listener, c Connection) (string, error) {
	left := slices.Clone(l.GetFilterChains())
	for _, fc := range left {
		m := proto.CloneOf(fc.GetFilterChainMatch())
		if m != nil { // what is read below; anything else would be a guess
			m.DestinationPort, m.PrefixRanges, m.TransportProtocol, m.ApplicationProtocols, m.SourcePrefixRanges = nil, nil, "", nil, nil
		}
		if proto.Size(m) > 0 {
			return "", fmt.Errorf("listener %s, chain %s: filter_chain_match {%v} is unknown here", l.GetName(), fc.GetName(), m)
		}
	}
	transport := c.TransportProtocol
	if transport == "" {
		transport = "raw_buffer"
	}
	// Each question: -1 does not hold, 0 is left open, and more is more specific.
	questions := []func(m *listenerv3.FilterChainMatch) (int, error){
		func(m *listenerv3.FilterChainMatch) (int, error) {
			return exact(m.GetDestinationPort() != nil, m.GetDestinationPort().GetValue() == uint32(c.DestinationPort)), nil
		},
		func(m *listenerv3.FilterChainMatch) (int, error) {
			return longest(m.GetPrefixRanges(), c.DestinationIP)
		},
		func(m *listenerv3.FilterChainMatch) (int, error) {
			return exact(m.GetTransportProtocol() != "", m.GetTransportProtocol() == transport), nil
		},
		func(m *listenerv3.FilterChainMatch) (int, error) {
			return firstOffered(m.GetApplicationProtocols(), c), nil
		},
		func(m *listenerv3.FilterChainMatch) (int, error) {
			return longest(m.GetSourcePrefixRanges(), c.SourceIP)
		},
	}
	for _, question := range questions {
		best := 0
		var kept []*listenerv3.FilterChain
		for _, fc := range left {
			score, err := question(fc.GetFilterChainMatch())
			if err != nil {
				return "", fmt.Errorf("listener %s, chain %s: %w", l.GetName(), fc.GetName(), err)
			}
			if score > best {
				best, kept = score, nil
			}
			if score == best {
				kept = append(kept, fc)
			}
		}
		left = kept
	}
	switch len(left) {
	case 0:
		return l.GetDefaultFilterChain().GetName(), nil
	case 1:
		return left[0].GetName(), nil
	}
	return "", fmt.Errorf("listener %s: chains %s and %s match alike; envoy refuses that", l.GetName(), left[0].GetName(), left[1].GetName())
}

func exact(asked, held bool) int {
	switch {
	case !asked:
		return 0
	case held:
		return 1
	}
	return -1
}

func longest(ranges []*corev3.CidrRange, addr netip.Addr) (int, error) {
	if len(ranges) == 0 {
		return 0, nil
	}
	best := -1
	for _, r := range ranges {
		a, err := netip.ParseAddr(r.GetAddressPrefix())
		if err != nil || r.GetPrefixLen() == nil {
			return 0, fmt.Errorf("range %v is no CIDR with a length", r)
		}
		p, err := a.Prefix(int(r.GetPrefixLen().GetValue()))
		if err != nil {
			return 0, fmt.Errorf("range %v: %w", r, err)
		}
		if p.Contains(addr.Unmap()) {
			best = max(best, 1+p.Bits())
		}
	}
	return best, nil
}

// firstOffered prefers the protocol that the client names first.
func firstOffered(wanted []string, c Connection) int {
	if len(wanted) == 0 {
		return 0
	}
	for i, offered := range c.ApplicationProtocols {
		if slices.Contains(wanted, offered) {
			return len(c.ApplicationProtocols) - i
		}
	}
	return -1
}
