package inject

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

// Capture says who redirects a pod's traffic to its Envoy.
type Capture string

const (
	// CaptureSidecar is by the sidecar itself, which needs NET_ADMIN.
	CaptureSidecar Capture = "sidecar"
	// CaptureNode is by a DaemonSet on the node; the sidecar needs no capability.
	CaptureNode Capture = "node"
)

// PodSecurity says what the labels pod-security.kubernetes.io/enforce of namespaces mean in the cluster.
type PodSecurity string

const (
	// PodSecurityEnforced is for clusters whose API server has the PodSecurity admission plugin, as it has by default.
	PodSecurityEnforced PodSecurity = "enforced"
	// PodSecurityIgnored is for clusters whose API server does without it: the labels mean nothing.
	PodSecurityIgnored PodSecurity = "ignored"
)

// Config is what all sidecars of a cluster share. Image, ControlPlane and TrustDomain are required.
type Config struct {
	Image           string            // with both binaries and Envoy
	ImagePullPolicy corev1.PullPolicy // "": IfNotPresent, since Image is pinned
	ControlPlane    string            // "host:port"
	TrustDomain     spiffeid.TrustDomain
	Capture         Capture     // "": CaptureSidecar
	PodSecurity     PodSecurity // "": PodSecurityEnforced
	// Default gives sidecars to the pods of namespaces without the label policy.InjectLabel too, system namespaces excepted.
	Default bool
	// System are namespaces whose pods never get one; kube-system is one without being named.
	System []string
	// Resources of the sidecar; both lists empty: DefaultResources.
	Resources corev1.ResourceRequirements
	// Concurrency is the number of Envoy's worker threads; 0: 1.
	Concurrency int
	// DrainTimeout is how long open connections may live on when the pod ends; 0: 5 s.
	DrainTimeout time.Duration
	// StartupTimeout is how long the sidecar may take until it enforces before it is started anew; 0: 2 min, with CaptureNode 5 min.
	StartupTimeout time.Duration
}

// DefaultResources are an idle sidecar's needs with room for some ten thousand peer identities.
func DefaultResources() corev1.ResourceRequirements {
	return corev1.ResourceRequirements{
		Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m"), corev1.ResourceMemory: resource.MustParse("96Mi")},
		Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("512Mi")},
	}
}

// complete fills in defaults and says what is wrong.
func (c Config) complete() (Config, error) {
	if c.ImagePullPolicy == "" {
		c.ImagePullPolicy = corev1.PullIfNotPresent
	}
	if c.Capture == "" {
		c.Capture = CaptureSidecar
	}
	if c.PodSecurity == "" {
		c.PodSecurity = PodSecurityEnforced
	}
	if len(c.Resources.Requests) == 0 && len(c.Resources.Limits) == 0 {
		c.Resources = DefaultResources()
	}
	if c.Concurrency == 0 {
		c.Concurrency = 1
	}
	if c.DrainTimeout == 0 {
		c.DrainTimeout = 5 * time.Second
	}
	if c.StartupTimeout == 0 {
		c.StartupTimeout = defaultStartupTimeout
		if c.Capture == CaptureNode {
			c.StartupTimeout = defaultNodeStartupTimeout
		}
	}
	switch {
	case c.Image == "":
		return c, errors.New("sidecar: no image is set")
	case !isHostPort(c.ControlPlane):
		return c, fmt.Errorf("sidecar: control plane address %q is not host:port", c.ControlPlane)
	case c.TrustDomain.IsZero():
		return c, errors.New("sidecar: no trust domain is set")
	case c.Capture != CaptureSidecar && c.Capture != CaptureNode:
		return c, fmt.Errorf("sidecar: capture %q is not %s or %s", string(c.Capture), CaptureSidecar, CaptureNode)
	case c.PodSecurity != PodSecurityEnforced && c.PodSecurity != PodSecurityIgnored:
		return c, fmt.Errorf("sidecar: podSecurity %q is not %s or %s", string(c.PodSecurity), PodSecurityEnforced, PodSecurityIgnored)
	case c.Concurrency < 0 || c.DrainTimeout < 0 || c.StartupTimeout < 0:
		return c, errors.New("sidecar: concurrency, drain timeout and startup timeout must not be negative")
	case c.Capture == CaptureSidecar && c.StartupTimeout > mostHookTimeout:
		return c, fmt.Errorf("sidecar: startup timeout %s: at most %s: a pod that is deleted meanwhile waits for it", c.StartupTimeout, mostHookTimeout)
	}
	return c, nil
}

// Check says what is wrong with a configuration, if anything is.
func (c Config) Check() error {
	_, err := c.complete()
	return err
}

func isHostPort(s string) bool {
	i := strings.LastIndexByte(s, ':')
	if i < 1 {
		return false
	}
	port, err := strconv.ParseUint(s[i+1:], 10, 16)
	return err == nil && port > 0
}
