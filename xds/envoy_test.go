package xds

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	internallistenerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/bootstrap/internal_listener/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/mantlet/mantlet/verdict"
	"github.com/mantlet/mantlet/xds/names"
)

// envoyBinary is the pinned Envoy.
func envoyBinary(t *testing.T) string {
	t.Helper()
	path := os.Getenv("MANTLET_ENVOY")
	if path == "" {
		path, _ = filepath.Abs("../.cache/envoy/envoy")
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("no Envoy: %v\nrun: make envoy", err)
	}
	return path
}

// TestEnvoyTakesWhatIsEmitted has the real Envoy validate resources with everything that verdicts can hold: many disjoint ports and
// ranges, identities with addresses, prefixes of every length, nothing at all.
func TestEnvoyTakesWhatIsEmitted(t *testing.T) {
	node := []netip.Addr{netip.MustParseAddr("10.64.0.1"), netip.MustParseAddr("fd00:10:64::1")}
	network := &verdict.Network{
		Cluster: []netip.Prefix{netip.MustParsePrefix("10.64.0.0/16"), netip.MustParsePrefix("fd00:10:64::/64")}, Node: node, NodePorts: verdict.PortRange{First: 8, Last: 60000},
		Services: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.1:80"), netip.MustParseAddrPort("203.0.113.2:15001"), netip.MustParseAddrPort("[2001:db8::1]:80")},
		HostPorts: []netip.AddrPort{netip.MustParseAddrPort("10.64.0.1:80"), netip.MustParseAddrPort("10.64.0.1:9100"), netip.MustParseAddrPort("10.64.0.1:15001"),
			netip.MustParseAddrPort("[fd00:10:64::1]:80")},
	}
	for name, v := range map[string]*verdict.Verdicts{"rich": rich(), "nothing": {}} {
		t.Run(name, func(t *testing.T) {
			sessions := Resume
			if name == "nothing" {
				sessions = NeverResume
			}
			b := &bootstrapv3.Bootstrap{
				Node: &corev3.Node{Id: "test", Cluster: "test"},
				DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{AdsConfig: &corev3.ApiConfigSource{
					ApiType: corev3.ApiConfigSource_DELTA_GRPC, TransportApiVersion: corev3.ApiVersion_V3, GrpcServices: []*corev3.GrpcService{agent()}}},
				BootstrapExtensions: []*corev3.TypedExtensionConfig{{Name: "internal_listener", TypedConfig: pack(&internallistenerv3.InternalListener{})}},
				StaticResources: &bootstrapv3.Bootstrap_StaticResources{
					Listeners: []*listenerv3.Listener{Inbound(node, sessions), Outbound(v, network), Gate(v)},
					Clusters: append(Clusters(), agentCluster(), OnDemand("od|10.64.0.9:80", []Endpoint{
						{Addr: netip.MustParseAddrPort("10.64.0.9:80"), ID: spiffeid.RequireFromString("spiffe://mantlet.local/ns/a/sa/b/labels/c")},
						{Addr: netip.MustParseAddrPort("[fd00:10:64::9]:80")},
					}, sessions), OnDemand("od|[fd00:10:64::9]:80", nil, sessions)),
				},
			}
			text, err := protojson.Marshal(b)
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(t.TempDir(), "bootstrap.json")
			if err := os.WriteFile(file, text, 0o644); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(envoyBinary(t), "--mode", "validate", "-c", file, "-l", "warn", "--component-log-level", "misc:error").CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}

func agentCluster() *clusterv3.Cluster {
	return static(names.ClusterAgent, []*endpointv3.LbEndpoint{{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
		Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: "/nowhere"}}}}}}})
}

func rich() *verdict.Verdicts {
	reasons := []verdict.Reason{{Policy: "shop/p", Rule: "ingress[0]", Text: "admits"}, {Text: "no"}}
	allow, deny := verdict.Verdict{Allow: true}, verdict.Verdict{Reason: 1}
	var ports []verdict.PortRange
	for p := 1000; p < 60000; p += 97 {
		ports = append(ports, verdict.PortRange{First: uint16(p), Last: uint16(p + p%50)})
	}
	var prefixes []verdict.Prefix
	for bits := range 33 {
		v := allow
		if bits%2 == 1 {
			v = deny
		}
		prefixes = append(prefixes, verdict.Prefix{Prefix: netip.PrefixFrom(netip.MustParseAddr("203.0.113.7"), bits).Masked(), Verdict: v})
	}
	for bits := range 129 {
		prefixes = append(prefixes, verdict.Prefix{Prefix: netip.PrefixFrom(netip.MustParseAddr("2001:db8::7"), bits).Masked(), Verdict: allow})
	}
	var ids []verdict.Identity
	for i := range 50 {
		id := verdict.Identity{ID: spiffeid.RequireFromString(fmt.Sprintf("spiffe://mantlet.local/ns/shop/sa/s%d/labels/x", i)), Verdict: allow}
		if i%3 == 0 {
			id.Verdict, id.Addresses = deny, prefixes[20:25]
		}
		ids = append(ids, id)
	}
	table := verdict.Table{Isolating: []string{"shop/p"}, Reasons: reasons, Blocks: []verdict.Block{
		{Protocol: verdict.TCP, Ports: ports, Peers: verdict.Peers{ByIdentity: ids, Identified: prefixes, Anonymous: prefixes}},
		{Protocol: verdict.TCP, Ports: []verdict.PortRange{{First: 80, Last: 80}}, Peers: verdict.Peers{Anonymous: prefixes[:1]}},
		{Protocol: verdict.UDP, Ports: []verdict.PortRange{verdict.AllPorts}},
	}}
	return &verdict.Verdicts{Ingress: table, Egress: table}
}
