// Package settings is the configuration file of an installed control plane (`mantlet control-plane --config`), which `mantlet install` and
// the Helm chart write into a ConfigMap. What differs between the replicas, such as addresses to listen on, are flags.
package settings

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/verdict"
)

// Settings are the file, as YAML. Required are namespace, image and trustDomain.
type Settings struct {
	// Namespace is the control plane's own.
	Namespace string `json:"namespace"`
	// TrustDomain is the SPIFFE trust domain.
	TrustDomain string `json:"trustDomain"`
	// MTLS is the mode of namespaces without the label policy.ModeLabel: permissive or strict; "": permissive.
	MTLS string `json:"mtls,omitempty"`
	// PodNetworks and ServiceNetworks are ranges of the cluster; empty: what the API says of nodes and ServiceCIDRs.
	PodNetworks     []string `json:"podNetworks,omitempty"`
	ServiceNetworks []string `json:"serviceNetworks,omitempty"`
	// NodeAddresses are addresses from which every node may speak to its pods, beside its own.
	NodeAddresses []string `json:"nodeAddresses,omitempty"`
	// NodePorts is the API server's --service-node-port-range, "30000-32767"; "": that one.
	NodePorts string `json:"nodePorts,omitempty"`
	// SystemNamespaces never get sidecars; Namespace and kube-system need not be named.
	SystemNamespaces []string `json:"systemNamespaces,omitempty"`
	// InjectByDefault gives sidecars to namespaces without a label too.
	InjectByDefault bool `json:"injectByDefault,omitempty"`
	// Capture is sidecar or node; "": sidecar.
	Capture string `json:"capture,omitempty"`
	// PodSecurity is enforced or ignored; "": enforced.
	PodSecurity string `json:"podSecurity,omitempty"`
	// Image is the sidecar's, and ImagePullPolicy how the kubelet gets it.
	Image           string            `json:"image"`
	ImagePullPolicy corev1.PullPolicy `json:"imagePullPolicy,omitempty"`
	// Sidecar is what may be set of every sidecar.
	Sidecar Sidecar `json:"sidecar,omitzero"`
}

// Sidecar holds the fields of inject.Config of the same names.
type Sidecar struct {
	Resources      corev1.ResourceRequirements `json:"resources,omitzero"`
	Concurrency    int                         `json:"concurrency,omitempty"`
	DrainTimeout   metav1.Duration             `json:"drainTimeout,omitzero"`
	StartupTimeout metav1.Duration             `json:"startupTimeout,omitzero"`
}

// Read reads and checks a file. Fields that are not known are errors.
func Read(text []byte) (*Settings, error) {
	var s Settings
	value, err := yaml.YAMLToJSONStrict(text)
	if err != nil {
		return nil, fmt.Errorf("settings: %w", err)
	}
	unknown, err := kjson.UnmarshalStrict(value, &s) // tells upper from lower case
	if err = errors.Join(append(unknown, err)...); err != nil {
		return nil, fmt.Errorf("settings: %w", err)
	}
	if err := s.Check(); err != nil {
		return nil, fmt.Errorf("settings: %w", err)
	}
	return &s, nil
}

// Check says what is wrong.
func (s *Settings) Check() error {
	if s.Namespace == "" {
		return errors.New("namespace is missing")
	}
	if _, err := s.Mode(); err != nil {
		return fmt.Errorf("mtls: %w", err)
	}
	if _, _, err := s.Networks(); err != nil {
		return err
	}
	if _, err := s.NodeAddrs(); err != nil {
		return err
	}
	if _, err := s.NodePortRange(); err != nil {
		return err
	}
	c, err := s.Inject()
	if err != nil {
		return err
	}
	return c.Check()
}

// Mode is MTLS.
func (s *Settings) Mode() (verdict.Mode, error) {
	if s.MTLS == "" {
		return verdict.Permissive, nil
	}
	return verdict.ParseMode(s.MTLS)
}

// Networks are PodNetworks and ServiceNetworks.
func (s *Settings) Networks() (pods, services []netip.Prefix, err error) {
	if pods, err = prefixes("podNetworks", s.PodNetworks); err != nil {
		return nil, nil, err
	}
	services, err = prefixes("serviceNetworks", s.ServiceNetworks)
	return pods, services, err
}

func prefixes(field string, list []string) (out []netip.Prefix, err error) {
	for i, text := range list {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() {
			return nil, fmt.Errorf("%s[%d]: %q is not a range such as 10.0.0.0/8 or fd00::/64", field, i, text)
		}
		out = append(out, p)
	}
	return out, nil
}

// NodeAddrs are NodeAddresses.
func (s *Settings) NodeAddrs() (out []netip.Addr, err error) {
	for i, text := range s.NodeAddresses {
		a, err := netip.ParseAddr(text)
		if err != nil || a.Zone() != "" {
			return nil, fmt.Errorf("nodeAddresses[%d]: %q is not an address", i, text)
		}
		out = append(out, a.Unmap())
	}
	return out, nil
}

// NodePortRange is NodePorts.
func (s *Settings) NodePortRange() (verdict.PortRange, error) {
	if s.NodePorts == "" {
		return verdict.DefaultNodePorts, nil
	}
	r, err := verdict.ParsePortRange(s.NodePorts)
	if err != nil {
		return r, fmt.Errorf("nodePorts: %w", err)
	}
	return r, nil
}

// Address is where sidecars find the control plane.
func (s *Settings) Address() string {
	return fmt.Sprintf("%s:%d", s.Host(), names.ServicePort)
}

// Host is the DNS name of the control plane's Service; its certificate has it.
func (s *Settings) Host() string { return names.Service + "." + s.Namespace + ".svc" }

// Inject is how sidecars are made.
func (s *Settings) Inject() (inject.Config, error) {
	td, err := spiffeid.TrustDomainFromString(s.TrustDomain)
	if err != nil {
		return inject.Config{}, fmt.Errorf("trustDomain %q: %w", s.TrustDomain, err)
	}
	return inject.Config{
		Image: s.Image, ImagePullPolicy: s.ImagePullPolicy, ControlPlane: s.Address(), TrustDomain: td,
		Capture: inject.Capture(s.Capture), PodSecurity: inject.PodSecurity(s.PodSecurity),
		Default: s.InjectByDefault, System: append(slices.Clone(s.SystemNamespaces), s.Namespace),
		Resources: s.Sidecar.Resources, Concurrency: s.Sidecar.Concurrency,
		DrainTimeout: s.Sidecar.DrainTimeout.Duration, StartupTimeout: s.Sidecar.StartupTimeout.Duration,
	}, nil
}
