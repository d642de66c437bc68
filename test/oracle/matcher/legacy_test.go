package matcher

import (
	"net/netip"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func cidrs(list ...string) []*corev3.CidrRange {
	var ranges []*corev3.CidrRange
	for _, s := range list {
		p := netip.MustParsePrefix(s)
		ranges = append(ranges, &corev3.CidrRange{AddressPrefix: p.Addr().String(), PrefixLen: wrapperspb.UInt32(uint32(p.Bits()))})
	}
	return ranges
}

// byMatch is a listener without filter_chain_matcher, shaped like the one that receives a pod's traffic.
func byMatch(dir string) *listenerv3.Listener {
	l := listener(dir, 0)
	l.DefaultFilterChain = naming("default")
	for _, c := range []struct {
		name  string
		match *listenerv3.FilterChainMatch
	}{
		{"loop", &listenerv3.FilterChainMatch{DestinationPort: wrapperspb.UInt32(81)}},
		{"port and source", &listenerv3.FilterChainMatch{DestinationPort: wrapperspb.UInt32(8080), SourcePrefixRanges: cidrs("10.0.0.0/24")}},
		{"here", &listenerv3.FilterChainMatch{PrefixRanges: cidrs("10.0.0.2/32", "fd00::2/128"), TransportProtocol: "raw_buffer"}},
		{"mtls", &listenerv3.FilterChainMatch{TransportProtocol: "tls", ApplicationProtocols: []string{"mantlet"}}},
		{"h2", &listenerv3.FilterChainMatch{TransportProtocol: "tls", ApplicationProtocols: []string{"h2"}}},
		{"node", &listenerv3.FilterChainMatch{SourcePrefixRanges: cidrs("10.0.1.1/32", "fd00::1/128")}},
		{"wide", &listenerv3.FilterChainMatch{SourcePrefixRanges: cidrs("10.0.0.0/16")}},
	} {
		fc := naming(c.name)
		fc.FilterChainMatch = c.match
		l.FilterChains = append(l.FilterChains, fc)
	}
	return l
}

// TestByFilterChainMatch has the interpreter and the real Envoy choose among all combinations.
func TestByFilterChainMatch(t *testing.T) {
	dir := t.TempDir()
	l := byMatch(dir)
	start(t, dir, []*listenerv3.Listener{l})
	met := map[string]int{}
	for _, source := range addresses {
		for _, destination := range addresses {
			for _, port := range []uint16{80, 81, 8080} {
				for _, protocols := range []string{"plain", "", "mantlet", "h2", "mantlet h2", "h2 mantlet", "x h2"} {
					c := Connection{SourceIP: netip.MustParseAddr(source), SourcePort: 4000, DestinationIP: netip.MustParseAddr(destination), DestinationPort: port}
					if c.SourceIP.Is4() != c.DestinationIP.Is4() {
						continue
					}
					if protocols != "plain" {
						c.TransportProtocol, c.ApplicationProtocols = "tls", strings.Fields(protocols)
					}
					want, err := FilterChain(l, c)
					if err != nil {
						t.Fatal(err)
					}
					met[want]++
					if got := chosen(t, l, c); got != want {
						t.Errorf("%s to %s port %d, %s: envoy chooses %q, the interpreter %q", source, destination, port, protocols, got, want)
					}
				}
			}
		}
	}
	for _, fc := range append(l.FilterChains, l.DefaultFilterChain) {
		if met[fc.GetName()] == 0 {
			t.Errorf("nothing comes to %q: %v", fc.GetName(), met)
		}
	}
}

func TestByFilterChainMatchRefuses(t *testing.T) {
	for name, match := range map[string]*listenerv3.FilterChainMatch{
		"a field that is not read":    {ServerNames: []string{"a.example"}},
		"another":                     {SourcePorts: []uint32{80}},
		"a range that is none":        {SourcePrefixRanges: []*corev3.CidrRange{{AddressPrefix: "x", PrefixLen: wrapperspb.UInt32(8)}}},
		"a range without a length":    {PrefixRanges: []*corev3.CidrRange{{AddressPrefix: "10.0.0.0"}}},
		"a range with too long a one": {PrefixRanges: []*corev3.CidrRange{{AddressPrefix: "10.0.0.0", PrefixLen: wrapperspb.UInt32(33)}}},
	} {
		l := listener("/x", 0)
		l.FilterChains = []*listenerv3.FilterChain{{Name: "one", FilterChainMatch: match}}
		if got, err := FilterChain(l, from("")); err == nil {
			t.Errorf("%s: %q without an error", name, got)
		}
	}
	twins := listener("/x", 0)
	twins.FilterChains = []*listenerv3.FilterChain{naming("one"), naming("two")}
	if got, err := FilterChain(twins, from("")); err == nil {
		t.Errorf("two chains alike: %q without an error", got)
	}
}
