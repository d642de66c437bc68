// Package names holds the names on which whoever injects sidecars, whoever watches pods and whoever installs Mantlet must agree. It
// imports nothing. What policy reads of objects is in package policy (InjectLabel, ModeLabel).
package names

// The sidecar in a pod's spec. A pod has a sidecar exactly if its spec.initContainers hold one of this name that restarts always; what an
// annotation says decides nothing, since whoever writes the pod writes it.
const (
	// Container is the native sidecar.
	Container = "mantlet-proxy"
	// TokenVolume is the projected volume with the pod's token.
	TokenVolume = "mantlet-token" //nolint:gosec // a name, no secret
	// RootVolume is the ConfigMap volume with the trust bundle.
	RootVolume = "mantlet-root"
	// RunVolume is the emptyDir in memory with the agent's and Envoy's sockets.
	RunVolume = "mantlet-run"
)

// Paths in the sidecar.
const (
	// TokenDir is where TokenVolume is mounted.
	TokenDir = "/var/run/secrets/mantlet.dev/token" //nolint:gosec // a path, no secret
	// TokenFile is the token in TokenDir.
	TokenFile = "token"
	// RootDir is where RootVolume is mounted.
	RootDir = "/var/run/mantlet/root"
	// RunMount is where RunVolume is mounted.
	RunMount = "/var/run/mantlet/pod"
	// RunDir is the agent's --run-dir. It is below the mount, since an agent that is not root does not own that.
	RunDir = RunMount + "/agent"
	// AgentBinary and EnvoyBinary are where the image has them.
	AgentBinary = "/usr/local/bin/mantlet-agent"
	EnvoyBinary = "/usr/local/bin/envoy"
)

// The token, a projected serviceAccountToken. identity/attest.Audience is its audience; a test holds both equal.
const (
	// TokenAudience is the audience that the control plane's TokenReview asks for.
	TokenAudience = "mantlet"
	// TokenSeconds is how long a token is valid; the kubelet renews it at 80 % of that.
	TokenSeconds = 3600
)

// The trust bundle, which the control plane keeps in every namespace with sidecars.
const (
	// RootConfigMap is the ConfigMap's name, in the pod's namespace.
	RootConfigMap = "mantlet-root"
	// RootKey is its key: every trusted root, PEM.
	RootKey = "ca.crt"
)

// Annotations on pods that are written by whoever injects; policy.SidecarAnnotation is another.
const (
	// InjectedAnnotation holds the hash of what was injected, so that status can tell pods that an upgrade left behind.
	InjectedAnnotation = "mantlet.dev/injected"
)

// InjectRequired is the value of the label policy.InjectLabel with which a namespace gives all of its pods a sidecar, and refuses those that opt out;
// "enabled" lets a pod opt out. Pods to which no policy applies (hostNetwork, static, Windows) get none in either.
const InjectRequired = "required"

// Where Mantlet itself is, unless the installation says otherwise.
const (
	// SystemNamespace is the control plane's namespace.
	SystemNamespace = "mantlet-system"
	// Service is the control plane's Service and Deployment.
	Service = "mantlet"
	// ServicePort is where agents reach the control plane (xDS, certificates).
	ServicePort = 15012
	// HealthPort has the control plane's probes and metrics.
	HealthPort = 15014
	// StatusPort has the control plane's reports, on loopback only.
	StatusPort = 15015
	// WebhookPort is where the API server reaches the webhooks, behind port 443 of Service.
	WebhookPort = 15017
	// WebhookConfiguration names the MutatingWebhookConfiguration and the ValidatingWebhookConfiguration.
	WebhookConfiguration = "mantlet"
	// CASecret holds the authority's key, chain and roots (ca.Material: tls.key, tls.crt, ca.crt) in SystemNamespace.
	CASecret = "mantlet-ca"
	// RetiredSecret holds which identities running pods no longer have (controlplane/retired) in SystemNamespace.
	RetiredSecret = "mantlet-retired"
)

// AllowAnnotation on a namespace lists, separated by commas, what injection would refuse in its pods and is to accept there: the Allow…
// constants.
const AllowAnnotation = "mantlet.dev/allow"

// What AllowAnnotation may list. Each weakens enforcement for the pods of that namespace.
const (
	// AllowCapabilities: app containers with NET_ADMIN, NET_RAW or more, or privileged: they can take the redirect away.
	AllowCapabilities = "capabilities"
	// AllowProxyUser: app containers that run as one of the users that sidecars run as: the redirect lets the pod's own sidecar's pass.
	AllowProxyUser = "proxy-user"
	// AllowHostPID: pods with hostPID.
	AllowHostPID = "host-pid"
	// AllowSharedProcesses: pods with shareProcessNamespace.
	AllowSharedProcesses = "shared-processes"
	// AllowHostPath: pods with hostPath volumes that lead to container runtimes, the kubelet, network plugins or processes of the node.
	AllowHostPath = "host-path"
	// AllowExec: kubectl exec into sidecars.
	AllowExec = "sidecar-exec"
)
