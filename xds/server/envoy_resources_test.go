package server_test

import (
	"fmt"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	"github.com/mantlet/mantlet/xds/server"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"sigs.k8s.io/yaml"
)

func fromYAML[M proto.Message](t testing.TB, m M, text string) M {
	t.Helper()
	j, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := protojson.Unmarshal(j, m); err != nil {
		t.Fatalf("%v in %s", err, j)
	}
	return m
}

func listener(t testing.TB, name, text string) *server.Resource {
	return resource(t, name, fromYAML(t, &listenerv3.Listener{}, text))
}

func cluster(t testing.TB, name, text string) *server.Resource {
	return resource(t, name, fromYAML(t, &clusterv3.Cluster{}, text))
}

// static is a cluster with one endpoint per port on 127.0.0.1; without ports, one that leads nowhere.
func static(t testing.TB, name string, ports ...int) *server.Resource {
	endpoints := ""
	for _, p := range ports {
		endpoints += fmt.Sprintf("{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: %d}}}},", p)
	}
	return cluster(t, name, fmt.Sprintf(`{name: %q, type: STATIC, connect_timeout: 2s, load_assignment: {cluster_name: %q, endpoints: [{lb_endpoints: [%s]}]}}`, name, name, endpoints))
}

const extensions = "type.googleapis.com/envoy.extensions.filters.network."

// proxy is a listener that first asks the ECDS filter rbac and then proxies to a cluster.
func proxy(t testing.TB, name string, port int, cluster string) *server.Resource {
	return listener(t, name, fmt.Sprintf(`
name: %s
address: {socket_address: {address: 127.0.0.1, port_value: %d}}
filter_chains:
- filters:
  - name: rbac
    config_discovery: {config_source: {ads: {}, resource_api_version: V3}, type_urls: [%srbac.v3.RBAC]}
  - name: tcp
    typed_config: {"@type": %stcp_proxy.v3.TcpProxy, stat_prefix: %s, cluster: %s}
`, name, port, extensions, extensions, name, cluster))
}

// onDemandProxy is a listener on every loopback address whose cluster is od|ADDRESS:PORT of the connection.
func onDemandProxy(t testing.TB, name string, port int) *server.Resource {
	return listener(t, name, fmt.Sprintf(`
name: %s
address: {socket_address: {address: 0.0.0.0, port_value: %d}}
filter_chains:
- filters:
  - name: destination
    typed_config:
      "@type": %sset_filter_state.v3.Config
      on_new_connection:
      - {object_key: envoy.tcp_proxy.cluster, format_string: {text_format_source: {inline_string: "od|%%DOWNSTREAM_LOCAL_ADDRESS%%"}}}
  - name: tcp
    typed_config:
      "@type": %stcp_proxy.v3.TcpProxy
      stat_prefix: %s
      cluster: nowhere
      on_demand: {odcds_config: {ads: {}, resource_api_version: V3}, timeout: 60s}
`, name, port, extensions, extensions, name))
}

// rbac is the ECDS resource that admits everyone or nobody.
func rbac(t testing.TB, action string) *server.Resource {
	return resource(t, "rbac", fromYAML(t, &corev3.TypedExtensionConfig{}, fmt.Sprintf(`
name: rbac
typed_config:
  "@type": %srbac.v3.RBAC
  stat_prefix: rbac
  rules: {action: %s, policies: {all: {permissions: [{any: true}], principals: [{any: true}]}}}
`, extensions, action)))
}
