package xds

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"sync/atomic"

	matcherv3 "github.com/cncf/xds/go/xds/type/matcher/v3"

	"github.com/mantlet/mantlet/xds/names"
)

// external leads to the services at external addresses, by port. An address that is not listed under a port falls to what comes after the map of ports.
// It is the same for all listeners: what was made last is kept, so that a change of policy does not make it again for each of them.
func external(services []netip.AddrPort) map[string]*matcherv3.Matcher_OnMatch {
	last := lastExternal.Load()
	if last == nil || !slices.Equal(last.services, services) {
		at := map[uint16][]route{}
		for _, s := range services {
			at[s.Port()] = append(at[s.Port()], route{netip.PrefixFrom(s.Addr(), s.Addr().BitLen()), chain(names.ChainMesh), names.ChainMesh})
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
