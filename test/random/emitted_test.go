package random

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/test/oracle/matcher"
	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds"
	"github.com/mantlet/mantlet/xds/names"
)

// emitted is what the sidecars of a world would be sent, by subject.
type emitted struct {
	index *policy.Index
	made  map[string]*verdict.Verdicts
}

func (e *emitted) verdicts(pod string) *verdict.Verdicts {
	k := e.index.Subject(pod).Key
	if e.made[k] == nil {
		e.made[k] = e.index.Verdicts(k)
	}
	return e.made[k]
}

func onNode(hosts []netip.Addr, a netip.Addr) bool { return slices.Contains(hosts, a) }

// TestEmittedMatchersAgreeWithOracle interprets the listeners and RBAC filters as Envoy would and holds them against the oracle.
func TestEmittedMatchersAgreeWithOracle(t *testing.T) {
	checked := map[string]int{}
	for i := range (*worlds + 4) / 5 { // each connection is interpreted twice or more
		s := *seed + uint64(i)
		w := oracle.Generate(rand.New(rand.NewPCG(s, 0)), oracle.Small)
		x, err := indexOf(w)
		if err != nil {
			t.Fatal(err)
		}
		e := &emitted{x, map[string]*verdict.Verdicts{}}
		services, hostPorts, asked := externalOf(w, s)
		gates, outs := map[string]*listenerv3.Listener{}, map[string]*listenerv3.Listener{}
		rbacs := map[string]*corev3.TypedExtensionConfig{}
		for _, c := range w.Connections() {
			if c.Protocol != verdict.TCP {
				continue
			}
			if isPod(c.To) && oracle.Sidecar(c.To) && c.From != c.To {
				to, _ := x.Pod(key(c.To))
				if onNode(to.NodeIPs, c.FromAddr) {
					continue // see TestInboundPicksTheChain
				}
				v := e.verdicts(key(c.To))
				gate := gates[key(c.To)]
				if gate == nil {
					gate = xds.Gate(v)
					if err := matcher.CheckListener(gate); err != nil {
						t.Fatalf("world %d: gate of %s: %v", s, key(c.To), err)
					}
					gates[key(c.To)] = gate
				}
				m := matcher.Connection{DestinationIP: c.ToAddr, DestinationPort: c.Port, SourceIP: c.FromAddr, FilterState: map[string]string{names.PeerID: names.Plaintext}}
				var want bool
				mtls := isPod(c.From) && oracle.Sidecar(c.From) && !c.Plaintext
				if mtls {
					id := x.Subject(key(c.From)).ID.String()
					m.FilterState[names.PeerID] = id
					want = true
					if len(w.Isolating(c.To, networkingv1.PolicyTypeIngress)) > 0 {
						in, _ := w.Ingress(c)
						out, _ := w.Egress(c)
						want = in && out
					}
					if rbacs[key(c.To)] == nil {
						rbacs[key(c.To)] = xds.RBAC(v)
					}
					ruling, err := matcher.RBAC(rbacs[key(c.To)], matcher.Connection{
						DestinationIP: m.DestinationIP, DestinationPort: m.DestinationPort, SourceIP: m.SourceIP, TransportProtocol: "tls",
						TLS: &matcher.TLS{URISANs: []string{id}}})
					if err != nil || ruling.Allowed != want {
						t.Fatalf("world %d: rbac of %s: %s: %+v, %v; oracle: %v\n%s", s, key(c.To), c, ruling, err, want, w.YAML())
					}
					checked["rbac"]++
				} else if want, _ = w.Allowed(c); onNode(nodesOf(x, c), c.ToAddr) {
					continue // the source reaches its own node, whatever this pod says
				}
				chain, err := matcher.FilterChain(gate, m)
				if err != nil || (chain == names.ChainAllow) != want {
					t.Fatalf("world %d: gate of %s: %s (mTLS %v): chain %q, %v; oracle: %v\n%s", s, key(c.To), c, mtls, chain, err, want, w.YAML())
				}
				checked["gate "+chain]++
			}
			if isPod(c.From) && oracle.Sidecar(c.From) && !c.Plaintext && !isPod(c.To) {
				from, _ := x.Pod(key(c.From))
				out := outs[key(c.From)]
				if out == nil {
					out = xds.Outbound(e.verdicts(key(c.From)), &verdict.Network{Cluster: w.PodNetwork, Node: from.NodeIPs, Services: services, HostPorts: hostPorts, NodePorts: verdict.PortRange{First: 30000, Last: 32000}})
					if err := matcher.CheckListener(out); err != nil {
						t.Fatal(err)
					}
					outs[key(c.From)] = out
				}
				chain, err := matcher.FilterChain(out, matcher.Connection{DestinationIP: c.ToAddr, DestinationPort: c.Port, SourceIP: c.FromAddr})
				want := names.ChainDeny
				inside := slices.ContainsFunc(w.PodNetwork, func(n netip.Prefix) bool { return n.Contains(c.ToAddr) })
				outside := c
				outside.To = nil // also a pod on the host's network: to policy it is an address
				egress, _ := w.Egress(outside)
				switch {
				case c.ToAddr.IsLoopback():
					want = names.ChainBlackhole // never captured: somebody dials the capture port itself
				case asked[netip.AddrPortFrom(c.ToAddr, c.Port)]:
					want = names.ChainMesh
					checked["external"]++
				case onNode(from.NodeIPs, c.ToAddr):
					want = names.ChainNode
				case inside:
					want = names.ChainMesh
				case egress:
					want = names.ChainPassthrough
				}
				if err != nil || chain != want {
					t.Fatalf("world %d: outbound of %s: %s: chain %q, %v; want %s\n%s", s, key(c.From), c, chain, err, want, w.YAML())
				}
				checked["outbound "+chain]++
				chain, err = matcher.FilterChain(out, matcher.Connection{DestinationIP: c.ToAddr, DestinationPort: 30000 + c.Port%2001, SourceIP: c.FromAddr})
				if err != nil || (chain != names.ChainMesh && !c.ToAddr.IsLoopback()) {
					t.Fatalf("world %d: outbound of %s: a node port of %s: chain %q, %v", s, key(c.From), c.ToAddr, chain, err)
				}
			}
		}
	}
	for _, kind := range []string{"rbac", "gate allow", "gate deny", "outbound deny", "outbound passthrough", "outbound mesh", "external"} {
		if checked[kind] == 0 {
			t.Errorf("no connection tried %s: the worlds prove nothing of it", kind)
		}
	}
	t.Log(checked)
}

// externalOf takes some of the destinations outside for services' external ones, and for host ports.
func externalOf(w oracle.World, s uint64) (services, hostPorts []netip.AddrPort, asked map[netip.AddrPort]bool) {
	r := rand.New(rand.NewPCG(s, 7))
	asked = map[netip.AddrPort]bool{}
	tried := map[netip.AddrPort]bool{}
	for _, c := range w.Connections() {
		to := netip.AddrPortFrom(c.ToAddr, c.Port)
		if isPod(c.To) || c.ToAddr.IsLoopback() || tried[to] || c.Port == names.OutboundPort {
			continue
		}
		tried[to] = true
		switch r.IntN(8) {
		case 0:
			services, asked[to] = append(services, to), true
		case 1:
			hostPorts, asked[to] = append(hostPorts, to), true
		}
	}
	slices.SortFunc(services, netip.AddrPort.Compare)
	slices.SortFunc(hostPorts, netip.AddrPort.Compare)
	return services, hostPorts, asked
}

func nodesOf(x *policy.Index, c oracle.Conn) []netip.Addr {
	if !isPod(c.From) {
		return nil
	}
	p, _ := x.Pod(key(c.From))
	return p.NodeIPs
}

func TestInboundPicksTheChain(t *testing.T) {
	node := []netip.Addr{netip.MustParseAddr("10.64.0.1"), netip.MustParseAddr("fd00:10:64::1")}
	l := xds.Inbound(node, xds.Resume)
	if err := matcher.CheckListener(l); err != nil {
		t.Fatal(err)
	}
	peer, peer6 := netip.MustParseAddr("10.64.0.9"), netip.MustParseAddr("fd00:10:64::9")
	for _, c := range []struct {
		what  string
		from  netip.Addr
		port  uint16
		proto string
		alpn  []string
		want  string
	}{
		{"a sidecar", peer, 80, "tls", []string{names.ALPN}, names.ChainMTLS},
		{"a sidecar over IPv6", peer6, 80, "tls", []string{names.ALPN}, names.ChainMTLS},
		{"plaintext", peer, 80, "", nil, names.ChainPlain},
		{"TLS of the app's own", peer, 443, "tls", []string{"h2", "http/1.1"}, names.ChainPlain},
		{"TLS without ALPN", peer, 443, "tls", nil, names.ChainPlain},
		{"our ALPN among others", peer, 443, "tls", []string{"h2", names.ALPN}, names.ChainPlain},
		{"a longer ALPN", peer, 443, "tls", []string{names.ALPN + "x"}, names.ChainPlain},
		{"the own node", node[0], 80, "", nil, names.ChainNode},
		{"the own node over IPv6", node[1], 80, "", nil, names.ChainNode},
		{"the own node with TLS", node[0], 443, "tls", []string{"h2"}, names.ChainNode},
		{"the capture port", peer, 15006, "", nil, names.ChainBlackhole},
		{"the capture port by TLS", peer, 15006, "tls", []string{names.ALPN}, names.ChainBlackhole},
		{"the outbound capture port", node[0], 15001, "", nil, names.ChainBlackhole},
	} {
		got, err := matcher.FilterChain(l, matcher.Connection{DestinationIP: netip.MustParseAddr("10.64.0.4"), DestinationPort: c.port, SourceIP: c.from,
			TransportProtocol: c.proto, ApplicationProtocols: c.alpn})
		if err != nil || got != c.want {
			t.Errorf("%s: chain %q, %v; want %q", c.what, got, err, c.want)
		}
	}
}
