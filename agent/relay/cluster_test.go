package relay

import (
	"net/netip"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const odName = "od|10.0.0.1:80"

func TestOnDemandNames(t *testing.T) {
	for dest, want := range map[string]string{
		"10.0.0.1:80": odName, "[fd00::1]:443": "od|[fd00::1]:443", "[::ffff:10.0.0.1]:80": odName, "[fe80::1%eth0]:1": "od|[fe80::1]:1",
	} {
		if got := onDemandName(netip.MustParseAddrPort(dest)); got != want {
			t.Errorf("%s: %q, want %q", dest, got, want)
		}
	}
}

func TestEndpoints(t *testing.T) {
	locality := func(c *clusterv3.Cluster) *endpointv3.LocalityLbEndpoints { return c.LoadAssignment.Endpoints[0] }
	for name, tt := range map[string]struct {
		change func(c *clusterv3.Cluster)
		want   int
		refuse string
	}{
		"one": {func(*clusterv3.Cluster) {}, 1, ""},
		"two localities": {func(c *clusterv3.Cluster) {
			c.LoadAssignment.Endpoints = append(c.LoadAssignment.Endpoints, locality(c))
		}, 2, ""},
		"none":           {func(c *clusterv3.Cluster) { c.LoadAssignment.Endpoints = nil }, 0, ""},
		"empty locality": {func(c *clusterv3.Cluster) { locality(c).LbEndpoints = nil }, 0, ""},
		"weight, priority": {func(c *clusterv3.Cluster) {
			locality(c).Priority, locality(c).LoadBalancingWeight = 1, wrapperspb.UInt32(2)
		}, 1, ""},
		"static, said": {func(c *clusterv3.Cluster) {
			c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC}
		}, 1, ""},
		"eds": {func(c *clusterv3.Cluster) {
			c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_EDS}
		}, 0, "not STATIC"},
		"original destination": {func(c *clusterv3.Cluster) {
			c.ClusterDiscoveryType = &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST}
		}, 0, "not STATIC"},
		"an extension": {func(c *clusterv3.Cluster) {
			c.ClusterDiscoveryType = &clusterv3.Cluster_ClusterType{ClusterType: &clusterv3.Cluster_CustomClusterType{Name: "x"}}
		}, 0, "cluster_type"},
		"another name":       {func(c *clusterv3.Cluster) { c.Name = "od|10.0.0.2:80" }, 0, "calls itself"},
		"another assignment": {func(c *clusterv3.Cluster) { c.LoadAssignment.ClusterName = "other" }, 0, "field 1"},
		"no assignment":      {func(c *clusterv3.Cluster) { c.LoadAssignment = nil }, 0, "0 load assignments"},
		"drops": {func(c *clusterv3.Cluster) {
			c.LoadAssignment.Policy = &endpointv3.ClusterLoadAssignment_Policy{DropOverloads: []*endpointv3.ClusterLoadAssignment_Policy_DropOverload{{}}}
		}, 0, "field 4"},
		"endpoints elsewhere": {func(c *clusterv3.Cluster) {
			locality(c).LbConfig = &endpointv3.LocalityLbEndpoints_LedsClusterLocalityConfig{LedsClusterLocalityConfig: &endpointv3.LedsClusterLocalityConfig{}}
		}, 0, "field 8"},
		"unhealthy": {func(c *clusterv3.Cluster) { locality(c).LbEndpoints[0].HealthStatus = corev3.HealthStatus_UNHEALTHY }, 0, "field 2"},
		"by name": {func(c *clusterv3.Cluster) {
			locality(c).LbEndpoints[0].HostIdentifier = &endpointv3.LbEndpoint_EndpointName{EndpointName: "x"}
		}, 0, "field 5"},
		"no address": {func(c *clusterv3.Cluster) { locality(c).LbEndpoints[0].HostIdentifier = nil }, 0, "no address"},
	} {
		t.Run(name, func(t *testing.T) {
			c := onDemandCluster(odName, true)
			tt.change(c)
			n, err := countEndpoints(&resource{name: odName, typeURL: TypeCluster, value: marshal(t, c)})
			switch {
			case tt.refuse == "" && (err != nil || n != tt.want):
				t.Errorf("%d, %v; want %d", n, err, tt.want)
			case tt.refuse != "" && (err == nil || n != 0 || !strings.Contains(err.Error(), tt.refuse)):
				t.Errorf("%d, %v; want an error with %q", n, err, tt.refuse)
			}
		})
	}
	if n, err := countEndpoints(&resource{name: odName, typeURL: TypeListener, value: marshal(t, onDemandCluster(odName, true))}); err == nil || n != 0 {
		t.Errorf("a listener: %d, %v", n, err)
	}
}

// Whatever the bytes: endpoints are seen only where the generated code sees as many, in a cluster of that name whose endpoints are in it.
func FuzzEndpoints(f *testing.F) {
	f.Add(marshal(f, onDemandCluster(odName, true)))
	f.Add(marshal(f, onDemandCluster(odName, false)))
	f.Add(append(marshal(f, onDemandCluster(odName, true)), marshal(f, onDemandCluster("other", true))...))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := countEndpoints(&resource{name: odName, typeURL: TypeCluster, value: b})
		var c clusterv3.Cluster
		if err != nil || proto.Unmarshal(b, &c) != nil {
			return
		}
		want := 0
		for _, l := range c.GetLoadAssignment().GetEndpoints() {
			want += len(l.GetLbEndpoints())
		}
		if n != want || c.GetName() != odName || c.GetType() != clusterv3.Cluster_STATIC || c.GetClusterType() != nil {
			t.Errorf("%d endpoints of %d in %v", n, want, &c)
		}
	})
}
