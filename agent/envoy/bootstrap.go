package envoy

import (
	"encoding/json"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mantlet/mantlet/xds/names"
)

// Bootstrap is what Envoy's static configuration depends on. Everything else it gets by xDS from the agent's socket.
type Bootstrap struct {
	Pod         string // "namespace/name": the node id
	AgentSocket string // path of the agent's unix socket
	AdminSocket string // path that Envoy makes its admin socket at, for its own user only
	Mark        uint32 // of the connections that Envoy opens; 0: unmarked
}

// maxSocketPath is how long the path of a unix socket may be: sun_path of unix(7), with its final zero.
const maxSocketPath = 107

type (
	object = map[string]any
	list   = []any
)

// JSON returns envoy.config.bootstrap.v3.Bootstrap as JSON. The text depends on the fields alone.
func (b Bootstrap) JSON() ([]byte, error) {
	if ns, name, ok := strings.Cut(b.Pod, "/"); !ok || ns == "" || name == "" || strings.Contains(name, "/") {
		return nil, fmt.Errorf("envoy bootstrap: pod %q is not of the form namespace/name", b.Pod)
	}
	for _, path := range []string{b.AgentSocket, b.AdminSocket} {
		if path == "" || len(path) > maxSocketPath {
			return nil, fmt.Errorf("envoy bootstrap: socket path %q must have 1 to %d bytes; choose a shorter run directory", path, maxSocketPath)
		}
	}
	ads := object{"ads": object{}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
	root := object{
		"node": object{"id": b.Pod, "cluster": "mantlet"},
		"admin": object{
			"address":                  object{"pipe": object{"path": b.AdminSocket, "mode": 0o600}},
			"ignore_global_conn_limit": true,
		},
		"dynamic_resources": object{
			"ads_config": object{
				"api_type": "DELTA_GRPC", "transport_api_version": "V3", "set_node_on_first_message_only": true,
				"grpc_services": list{object{"envoy_grpc": object{
					"cluster_name": names.ClusterAgent,
					// The agent is always there and serves from its cache; it ends the stream only where Envoy leaves too much unanswered.
					"retry_policy": object{"retry_back_off": object{"base_interval": "0.1s", "max_interval": "2s"}},
				}}},
			},
			"lds_config": ads, "cds_config": ads,
		},
		"static_resources": object{"clusters": list{b.agentCluster()}},
		"bootstrap_extensions": list{object{
			"name":         "internal_listener",
			"typed_config": object{"@type": "type.googleapis.com/envoy.extensions.bootstrap.internal_listener.v3.InternalListener"},
		}},
		// No limit to speak of: file descriptors run out first. Envoy warns at each start where there is none at all.
		"overload_manager": object{"resource_monitors": list{object{
			"name": "envoy.resource_monitors.global_downstream_max_connections",
			"typed_config": object{
				"@type":                             "type.googleapis.com/envoy.extensions.resource_monitors.downstream_connections.v3.DownstreamConnectionsConfig",
				"max_active_downstream_connections": 1 << 24,
			},
		}}},
		// The stats of on-demand clusters are much of what such a cluster costs, and nobody reads them: flows tell more. Those of the others
		// are made when there is something to count. Envoy compares a prefix that ends with a point without making each stat's name a string
		// (source/common/stats/stats_matcher_impl.cc).
		"deferred_stat_options": object{"enable_deferred_creation_stats": true},
		"stats_config": object{"stats_matcher": object{"exclusion_list": object{"patterns": list{
			object{"prefix": "cluster." + names.OnDemandStats + "."},
		}}}},
	}
	if b.Mark != 0 {
		root["cluster_manager"] = object{"upstream_bind_config": object{"socket_options": list{object{
			"description": "exempt from the pod's redirect",
			"level":       unix.SOL_SOCKET, "name": unix.SO_MARK, "int_value": b.Mark, "state": "STATE_PREBIND",
		}}}}
	}
	return json.Marshal(root)
}

func (b Bootstrap) agentCluster() object {
	return object{
		"name": names.ClusterAgent, "type": "STATIC", "connect_timeout": "1s",
		"load_assignment": object{"cluster_name": names.ClusterAgent, "endpoints": list{object{"lb_endpoints": list{
			object{"endpoint": object{"address": object{"pipe": object{"path": b.AgentSocket}}}},
		}}}},
		"typed_extension_protocol_options": object{
			"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": object{
				"@type":                "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
				"explicit_http_config": object{"http2_protocol_options": object{}},
			},
		},
		// Access log streams share the connection with ADS and SDS, one for each log and worker: the default limits do not count.
		"circuit_breakers": object{"thresholds": list{object{"max_requests": 1 << 20, "max_pending_requests": 1 << 20}}},
	}
}
