// Package names holds the names and numbers on which the control plane, the agent and Envoy must agree: ports, cluster names,
// secret names, log names. It imports nothing, so that the agent stays small.
package names

const (
	// InboundPort is where the pod's netns redirects TCP that arrives at the pod.
	InboundPort = 15006
	// OutboundPort is where the pod's netns redirects TCP that the app sends.
	OutboundPort = 15001
	// ProxyMark is the socket mark that exempts the agent's own connections from capture (and Envoy's, where the kernel gives
	// the pod one uid only). Setting it takes CAP_NET_ADMIN or CAP_NET_RAW, which apps do not have.
	ProxyMark = 0x6d74
)

const (
	// ALPN marks TLS between two sidecars; no application uses it.
	ALPN = "mantlet"
	// Plaintext stands in the filter state PeerID of a connection that carries no identity. It is no SPIFFE ID.
	Plaintext = "plaintext"
	// PeerID is the filter state key that holds the peer's SPIFFE ID, or Plaintext.
	PeerID = "mantlet.peer_id"
)

// Listeners.
const (
	Inbound  = "inbound"
	Gate     = "gate"
	Outbound = "outbound"
)

// Filter chains. Their names are fixed: a matcher change then applies in place.
const (
	ChainAllow       = "allow"       // gate: on to the app
	ChainDeny        = "deny"        // gate, outbound: closed before anything is sent
	ChainMTLS        = "mtls"        // inbound: TLS with ALPN
	ChainPlain       = "plain"       // inbound: everything else
	ChainNode        = "node"        // inbound: the pod's own node
	ChainBlackhole   = "blackhole"   // inbound, outbound: somebody speaks to the capture port itself
	ChainMesh        = "mesh"        // outbound: inside the cluster CIDRs
	ChainPassthrough = "passthrough" // outbound: allowed and outside the cluster CIDRs
)

// Clusters.
const (
	ClusterAgent       = "agent"       // bootstrap: the agent's unix socket (ADS, SDS, access logs)
	ClusterToGate      = "to-gate"     // the internal listener Gate
	ClusterApp         = "app"         // ORIGINAL_DST to the app in this pod
	ClusterPassthrough = "passthrough" // ORIGINAL_DST to the outside
	ClusterDeny        = "deny"        // STATIC without endpoints
	OnDemandPrefix     = "od|"         // on demand: od|IP:PORT, an IPv6 address in brackets
	OnDemandStats      = "od"          // in place of such a cluster's own name in the names of its stats
)

// RBAC is the ECDS resource of the network RBAC filter in the mTLS chain.
const RBAC = "rbac"

// Verdicts, of type TypeVerdicts (message Verdicts in api/mantlet/v1), are what a pod's agent decides by. No Envoy ever sees them.
const (
	Verdicts     = "verdicts"
	TypeVerdicts = "type.googleapis.com/mantlet.v1.Verdicts"
)

// Packets, of type TypePackets (message Packets in api/mantlet/v1), are a pod's UDP and SCTP by address, which its agent puts into the
// kernel. No Envoy ever sees them either.
const (
	Packets     = "packets"
	TypePackets = "type.googleapis.com/mantlet.v1.Packets"
)

// Network, of type TypeNetwork (message Network in api/mantlet/v1), tells the agent what is the cluster and what is its node.
const (
	Network     = "network"
	TypeNetwork = "type.googleapis.com/mantlet.v1.Network"
)

// SDS secrets, served by the agent.
const (
	SecretWorkload = "workload" // the pod's X.509-SVID and key
	SecretBundle   = "bundle"   // the trust bundle, with Envoy's SPIFFE certificate validator
)

// Access log names (log_name of Envoy's TcpGrpcAccessLogConfig), and LogHold, which is the agent's own.
const (
	LogGate     = "gate"     // the verdicts at this pod: who came, from where, to what, and whether it was let in
	LogInbound  = "inbound"  // connections that end before the gate: TLS failures, own node, capture port
	LogOutbound = "outbound" // connections of this pod's apps
	LogHold     = "hold"     // connections that were refused at their first packet, in both directions; of very many only some
	LogOpen     = "open"     // what reaches an app or the outside, at once when it does; the others tell when it ends
)

// Custom tags of access log entries.
const (
	// TagPeer is the SPIFFE ID of the pod that an outbound connection goes to, whether or not it has a sidecar.
	TagPeer = "mantlet.peer_id"
	// TagProof is the SPIFFE ID that the pod has to prove; without it the connection is plaintext.
	TagProof = "mantlet.proof"
	// TagChain is the filter chain that let a connection pass.
	TagChain = "mantlet.chain"
	// TagAlways is AlwaysAllowed on connections on which policy has no say.
	TagAlways = "mantlet.always"
)

// AlwaysAllowed is the value of TagAlways: the own node, or the pod itself.
const AlwaysAllowed = "allowed"

// Endpoint metadata of on-demand clusters, under the filter name EndpointMetadata.
const (
	EndpointMetadata = "mantlet"
	EndpointPeer     = "peer"   // logged as TagPeer
	EndpointProof    = "proof"  // logged as TagProof
	EndpointAlways   = "always" // logged as TagAlways
)
