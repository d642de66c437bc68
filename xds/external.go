package xds

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"sync/atomic"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// asked leads to what is asked about at addresses outside, by port: services at external addresses, and host ports of the own node. An address that is not
// listed under a port falls to what comes after the map of ports.
func asked(n *verdict.Network) map[string]*matcherv3.Matcher_OnMatch {
	out := external(n.Services)
	own := map[uint16]bool{} // ports
	for _, h := range n.HostPorts {
		own[h.Port()] = true
	}
	if len(own) == 0 {
		return out
	}
	at := map[uint16][]route{}
	for _, to := range n.Asked() {
		if own[to.Port()] {
			at[to.Port()] = append(at[to.Port()], toMesh(to))
		}
	}
	for port, routes := range at {
		out[strconv.Itoa(int(port))] = then(trie(destinationIP(), routes, nil))
	}
	return out
}

func toMesh(to netip.AddrPort) route {
	return route{netip.PrefixFrom(to.Addr(), to.Addr().BitLen()), chain(names.ChainMesh), names.ChainMesh}
}

// external leads to the services at external addresses. It is the same for all listeners: what was made last is kept, so that a change of policy does not
// make it again for each of them.
func external(services []netip.AddrPort) map[string]*matcherv3.Matcher_OnMatch {
	last := lastExternal.Load()
	if last == nil || !slices.Equal(last.services, services) {
		at := map[uint16][]route{}
		for _, s := range services {
			at[s.Port()] = append(at[s.Port()], toMesh(s))
		}
		last = &externalMatchers{slices.Clone(services), map[string]*matcherv3.Matcher_OnMatch{}}
		for port, routes := range at {
			last.byPort[strconv.Itoa(int(port))] = then(trie(destinationIP(), routes, nil))
		}
		lastExternal.Store(last)
	}
	return maps.Clone(last.byPort)
}

// externalMatchers are not changed once they are made.
type externalMatchers struct {
	services []netip.AddrPort
	byPort   map[string]*matcherv3.Matcher_OnMatch
}

var lastExternal atomic.Pointer[externalMatchers]
