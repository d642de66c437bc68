package random

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"k8s.io/apimachinery/pkg/types"

	"github.com/mantlet/mantlet/controlplane"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/test/oracle"
	"github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/server"
)

// TestClustersFollowChanges has every sidecar of a changing world ask for every address, and wants that after each change the clusters
// that it holds are those that a control plane would hand out that has only just read the world.
func TestClustersFollowChanges(t *testing.T) {
	for i := range (*worlds + 9) / 10 {
		clustersFollowChanges(t, *seed+uint64(i))
	}
}

func clustersFollowChanges(t *testing.T, s uint64) {
	r := rand.New(rand.NewPCG(s, 3))
	m := &mutant{Rand: r, World: oracle.Generate(r, oracle.Small)}
	cp := controlPlaneOf(t, m.World)
	conn := serve(t, cp)
	sidecars, asked := map[string]*sidecar{}, map[string]bool{names.OnDemandPrefix + "10.64.0.99:80": true}
	for range *steps {
		for _, name := range m.destinations() {
			asked[name] = true // what was asked for once stays asked for, whoever has the address later
		}
		all := slices.Sorted(maps.Keys(asked))
		fresh := controlPlaneOf(t, m.World)
		for _, p := range m.running().Objects.Pods {
			if !isPod(p) || !oracle.Sidecar(p) {
				continue
			}
			name := key(p)
			if sc := sidecars[name]; sc != nil && sc.uid != p.UID { // another pod of that name: the one before it is sent away
				sc.awaitEnd(t)
			}
			if sc := sidecars[name]; sc == nil || sc.ended() != nil {
				sidecars[name] = connect(t, conn, name)
			}
			sc := sidecars[name]
			sc.uid = p.UID
			sc.subscribe(all)
			for _, r := range [][2]string{{names.TypeNetwork, names.Network}, {server.ListenerType, names.Outbound}} {
				if got, want := publishedTo(cp, name, r[0], r[1]), publishedTo(fresh, name, r[0], r[1]); got != want {
					t.Fatalf("world %d: %s\n%s was published %s %s; want %s\n%s", s, strings.Join(m.story, "\n"), name, r[1], got, want, m.YAML())
				}
			}
			sc.await(t, cp, all)
			for _, cluster := range all {
				want := ""
				if res, ok := fresh.Resolve(server.Client(name), cluster); ok {
					want = endpointsOf(t, res.Any.UnmarshalTo)
				}
				if got := sc.holds(cluster); got != want {
					t.Fatalf("world %d: %s\n%s holds for %s: %q; want %q\n%s", s, strings.Join(m.story, "\n"), name, cluster, got, want, m.YAML())
				}
			}
		}
		for _, e := range m.change() {
			act := cp.Apply
			if e.gone {
				act = cp.Delete
			}
			if err := act(e.object); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// destinations are the names of all that a sidecar of the world may ask for.
func (m *mutant) destinations() []string {
	var list []string
	for i := range serviceAddrs {
		for _, port := range servicePorts {
			list = append(list, names.OnDemandPrefix+netip.AddrPortFrom(serviceAddr(i), uint16(port)).String())
		}
	}
	for _, to := range elsewhere() {
		list = append(list, names.OnDemandPrefix+to.String())
	}
	for _, p := range m.Objects.Pods {
		for _, a := range oracle.Addresses(p) {
			list = append(list, names.OnDemandPrefix+netip.AddrPortFrom(a, 80).String())
		}
	}
	return list
}

func controlPlaneOf(t *testing.T, w oracle.World) *controlplane.ControlPlane {
	t.Helper()
	cp, err := controlplane.New(controlplane.Config{Policy: policy.Config{
		TrustDomain: spiffeid.RequireTrustDomainFromString("mantlet.local"), PodNetwork: w.PodNetwork, DefaultMode: w.Mode,
	}}, server.Config{Authenticator: byName{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := cp.Load(&w.Objects); err != nil {
		t.Fatal(err)
	}
	return cp
}

// byName believes what the sidecar says of itself.
type byName struct{}

func (byName) Authenticate(ctx context.Context) (server.Client, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	return server.Client(strings.Join(md.Get("pod"), "")), nil
}

func serve(t *testing.T, cp *controlplane.ControlPlane) *grpc.ClientConn {
	t.Helper()
	g := grpc.NewServer()
	cp.Server().Register(g)
	lis := bufconn.Listen(1 << 20)
	var serving sync.WaitGroup
	serving.Go(func() { _ = g.Serve(lis) }) // ends by Stop
	conn, err := grpc.NewClient("passthrough:control-plane", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(); cp.Server().Close(); g.Stop(); serving.Wait() })
	return conn
}

// sidecar is as much of an Envoy as asks for resources and ACKs whatever comes.
type sidecar struct {
	name   string
	uid    types.UID
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

	mu       sync.Mutex
	err      error
	clusters map[string]string // endpoints by name; a removed cluster has none
	asked    map[string]bool
	changed  chan struct{} // closed at the next response
}

func connect(t *testing.T, conn *grpc.ClientConn, name string) *sidecar {
	t.Helper()
	ctx := metadata.AppendToOutgoingContext(t.Context(), "pod", name)
	st, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	sc := &sidecar{name: name, stream: st, clusters: map[string]string{}, asked: map[string]bool{}, changed: make(chan struct{})}
	sc.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: server.ClusterType, ResourceNamesSubscribe: []string{"*"}})
	sc.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: server.ListenerType, ResourceNamesSubscribe: []string{"*"}})
	sc.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: server.ExtensionType, ResourceNamesSubscribe: []string{names.RBAC}})
	sc.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: names.TypeVerdicts, ResourceNamesSubscribe: []string{names.Verdicts}})
	sc.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: names.TypePackets, ResourceNamesSubscribe: []string{names.Packets}})
	sc.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: names.TypeNetwork, ResourceNamesSubscribe: []string{names.Network}})
	go sc.receive(t)
	return sc
}

func (sc *sidecar) send(req *discoveryv3.DeltaDiscoveryRequest) {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	_ = sc.stream.Send(req) // where the stream has ended, receive says why
}

func (sc *sidecar) receive(t *testing.T) {
	for {
		resp, err := sc.stream.Recv()
		sc.mu.Lock()
		if err == nil && resp.TypeUrl == server.ClusterType {
			for _, r := range resp.Resources {
				sc.clusters[r.Name] = endpointsOf(t, r.Resource.UnmarshalTo)
			}
			for _, name := range resp.RemovedResources {
				sc.clusters[name] = ""
			}
		}
		sc.err = err
		close(sc.changed)
		sc.changed = make(chan struct{})
		sc.mu.Unlock()
		if err != nil {
			return
		}
		sc.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.TypeUrl, ResponseNonce: resp.Nonce})
	}
}

func (sc *sidecar) ended() error {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	return sc.err
}

func (sc *sidecar) awaitEnd(t *testing.T) {
	t.Helper()
	for deadline := time.After(20 * time.Second); ; {
		sc.mu.Lock()
		changed, err := sc.changed, sc.err
		sc.mu.Unlock()
		if err != nil {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			t.Fatalf("the stream of %s goes on, and the pod is another one", sc.name)
		}
	}
}

func (sc *sidecar) holds(cluster string) string {
	sc.mu.Lock()
	defer sc.mu.Unlock()
	return sc.clusters[cluster]
}

func (sc *sidecar) subscribe(all []string) {
	var missing []string
	for _, name := range all {
		if !sc.asked[name] {
			sc.asked[name] = true
			missing = append(missing, name)
		}
	}
	if len(missing) > 0 {
		sc.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: server.ClusterType, ResourceNamesSubscribe: missing})
	}
}

// await returns when every name was answered and the server knows that the sidecar holds all that it should.
func (sc *sidecar) await(t *testing.T, cp *controlplane.ControlPlane, all []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		sc.mu.Lock()
		open := slices.IndexFunc(all, func(name string) bool { _, ok := sc.clusters[name]; return !ok })
		changed, err := sc.changed, sc.err
		sc.mu.Unlock()
		if open < 0 {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("%s: no answer for %s (stream: %v)", sc.name, all[open], err)
		}
	}
	if err := cp.Server().Ledger().Wait(ctx, server.Client(sc.name)); err != nil {
		t.Fatal(err)
	}
}

// endpointsOf writes the addresses and expected identities of a cluster's endpoints.
func endpointsOf(t *testing.T, unmarshal func(proto.Message) error) string {
	c := &clusterv3.Cluster{}
	if err := unmarshal(c); err != nil {
		t.Error(err)
		return "not a cluster"
	}
	var out []string
	for _, l := range c.GetLoadAssignment().GetEndpoints() {
		for _, e := range l.LbEndpoints {
			a := e.GetEndpoint().GetAddress().GetSocketAddress()
			id := e.GetMetadata().GetFilterMetadata()["envoy.transport_socket_match"].GetFields()["id"].GetStringValue()
			out = append(out, fmt.Sprintf("%s:%d as %q", a.GetAddress(), a.GetPortValue(), id))
		}
	}
	return strings.Join(out, ", ")
}
