package inject

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// defaultStartupTimeout is how long a sidecar may take until it enforces, where nothing else is said: on a node that starts a hundred pods at once it
// takes half a minute. An agent that the control plane does not answer gives a hook up sooner (agent.Started).
const (
	defaultStartupTimeout     = 2 * time.Minute
	defaultNodeStartupTimeout = 5 * time.Minute // probes hold up nothing
)

// mostHookTimeout is as long as the agent lets itself be asked.
const mostHookTimeout = 10 * time.Minute

// probeWait is how long one run of the startup probe waits for the agent. It ends as soon as the pod is enforced, so that the app
// starts then, and not at the next full second.
const probeWait = 10 * time.Second

// serviceAccountDir is where the API server mounts the pod's own token into every container.
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// sidecar is the native sidecar. What the API server would fill in is written out, so that a sidecar that it has seen equals this one.
func (c Config) sidecar() corev1.Container {
	capture := "redirect"
	if c.Capture == CaptureNode {
		capture = "node"
	}
	always := corev1.ContainerRestartPolicyAlways
	return corev1.Container{
		Name:            names.Container,
		Image:           c.Image,
		ImagePullPolicy: c.ImagePullPolicy,
		RestartPolicy:   &always,
		Command:         []string{names.AgentBinary, "run"},
		Args: []string{
			"--pod=$(POD_NAMESPACE)/$(POD_NAME)",
			"--control-plane=" + c.ControlPlane,
			"--trust-domain=" + c.TrustDomain.Name(),
			"--bundle=" + path.Join(names.RootDir, names.RootKey),
			"--token-file=" + path.Join(names.TokenDir, names.TokenFile),
			"--run-dir=" + names.RunDir,
			"--envoy=" + names.EnvoyBinary,
			"--concurrency=" + strconv.Itoa(c.Concurrency),
			"--drain-timeout=" + c.DrainTimeout.String(),
			"--capture=" + capture,
		},
		Env:       []corev1.EnvVar{ownField("POD_NAME", "metadata.name"), ownField("POD_NAMESPACE", "metadata.namespace")},
		Resources: *c.Resources.DeepCopy(),
		VolumeMounts: []corev1.VolumeMount{
			{Name: names.RunVolume, MountPath: names.RunMount},
			{Name: names.RootVolume, MountPath: names.RootDir, ReadOnly: true},
			{Name: names.TokenVolume, MountPath: names.TokenDir, ReadOnly: true},
		},
		Lifecycle:                c.lifecycle(),
		StartupProbe:             c.startupProbe(),
		SecurityContext:          c.securityContext(),
		TerminationMessagePath:   corev1.TerminationMessagePathDefault,
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError, // why the agent gave up is its last line
	}
}

func ownField(name, path string) corev1.EnvVar {
	return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
}

// lifecycle and startupProbe are the gate: nothing else in the pod starts before the pod is enforced. One of them is nil.
//
// A hook is what the kubelet runs and waits for as it starts the sidecar, and then it goes on at once. A probe it asks once a second, from before
// there is a container, and of its success it thinks at its next look at all pods, which is once a second, too: a second or more is lost. If
// the hook fails the sidecar is ended and started anew, with the kubelet's pauses.
//
// But a kubelet that starts anew itself takes a sidecar that runs for one whose hook has passed. That is no harm where the agent closes the pod
// before all else. With node capture there may be pods that nobody has closed (those that came before the plugin): there it is the probe.
func (c Config) lifecycle() *corev1.Lifecycle {
	if c.Capture == CaptureNode {
		return nil
	}
	return &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: ask("started", c.StartupTimeout)}}
}

func (c Config) startupProbe() *corev1.Probe {
	if c.Capture != CaptureNode {
		return nil
	}
	return &corev1.Probe{
		ProbeHandler:     corev1.ProbeHandler{Exec: ask("ready", probeWait)},
		TimeoutSeconds:   int32(probeWait/time.Second) + 5,
		PeriodSeconds:    1,
		SuccessThreshold: 1,
		FailureThreshold: int32(max(1, c.StartupTimeout/probeWait)),
	}
}

// ask has the agent asked, in its container.
func ask(question string, wait time.Duration) *corev1.ExecAction {
	return &corev1.ExecAction{Command: []string{names.AgentBinary, question, "--run-dir=" + names.RunDir, "--wait=" + wait.String()}}
}

// securityContext overrides what the pod says for all its containers. The package comment says what each capability is for.
func (c Config) securityContext() *corev1.SecurityContext {
	s := &corev1.SecurityContext{
		Privileged:               new(bool),
		AllowPrivilegeEscalation: new(bool),
		ReadOnlyRootFilesystem:   new(true),
		SeccompProfile:           &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
	}
	if c.Capture == CaptureNode {
		s.RunAsNonRoot = new(true) // as whom, runAs says
		return s
	}
	s.RunAsNonRoot, s.RunAsUser, s.RunAsGroup = new(false), new(int64(0)), new(int64(0))
	s.Capabilities.Add = []corev1.Capability{"CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "NET_ADMIN", "NET_RAW", "SETGID", "SETUID"}
	return s
}

// runAs gives a sidecar the user of its pod. One that captures traffic itself is root, and chooses as whom it runs Envoy.
func (c Config) runAs(s *corev1.Container, u proxyuser.User) {
	if c.Capture == CaptureNode {
		s.SecurityContext.RunAsUser, s.SecurityContext.RunAsGroup = new(int64(u.UID)), new(int64(u.GID))
	}
}

// usersOf are those of which one is that of a pod's Envoy.
func usersOf(pod *corev1.Pod) proxyuser.Range {
	if h := pod.Spec.HostUsers; h != nil && !*h {
		return proxyuser.Mapped
	}
	return proxyuser.Pod
}

// userOf is as whom a pod's sidecar runs by the pod's spec, if that is as one of those that sidecars run as; else one of those, which the spec then does
// not say.
func userOf(pod *corev1.Pod) proxyuser.User {
	if i := sidecarIn(pod.Spec.InitContainers); i >= 0 {
		s := pod.Spec.InitContainers[i].SecurityContext
		if s != nil && s.RunAsUser != nil && s.RunAsGroup != nil && proxyuser.Pod.HasID(*s.RunAsUser) && proxyuser.Pod.HasID(*s.RunAsGroup) {
			return proxyuser.User{UID: uint32(*s.RunAsUser), GID: uint32(*s.RunAsGroup)}
		}
	}
	return proxyuser.User{UID: proxyuser.Pod.First, GID: proxyuser.Pod.First}
}

// volumes are those that the sidecar mounts.
func (c Config) volumes() []corev1.Volume {
	mode := corev1.ConfigMapVolumeSourceDefaultMode
	return []corev1.Volume{
		{Name: names.RunVolume, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{
			Medium: corev1.StorageMediumMemory, SizeLimit: new(resource.MustParse("16Mi"))}}},
		{Name: names.RootVolume, VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: names.RootConfigMap}, DefaultMode: &mode,
			Items: []corev1.KeyToPath{{Key: names.RootKey, Path: names.RootKey}}}}},
		{Name: names.TokenVolume, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
			DefaultMode: new(mode),
			Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{
				Audience: names.TokenAudience, ExpirationSeconds: new(int64(names.TokenSeconds)), Path: names.TokenFile}}}}}},
	}
}

// Hash is 16 hexadecimal digits that differ when what is injected does, but for the user.
func (c Config) Hash() (string, error) {
	c, err := c.complete()
	if err != nil {
		return "", err
	}
	return hash(c.sidecar(), c.volumes()), nil
}

func hash(container corev1.Container, volumes []corev1.Volume) string {
	b, err := json.Marshal(struct {
		Container corev1.Container
		Volumes   []corev1.Volume
	}{container, volumes})
	if err != nil {
		panic(fmt.Sprintf("inject: marshal the sidecar: %v", err)) // types that always can be
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:8])
}

// keep takes over from a sidecar that is there what the API server's own admission plugins add to containers: the service account's
// token, and resources that a LimitRange sets where nothing is said.
func keep(wanted corev1.Container, there *corev1.Container) corev1.Container {
	for _, m := range there.VolumeMounts {
		if m.MountPath == serviceAccountDir && m.ReadOnly && strings.HasPrefix(m.Name, "kube-api-access-") {
			wanted.VolumeMounts = append(wanted.VolumeMounts, m)
		}
	}
	wanted.Resources.Requests = filled(wanted.Resources.Requests, there.Resources.Requests)
	wanted.Resources.Limits = filled(wanted.Resources.Limits, there.Resources.Limits)
	return wanted
}

// filled adds what is missing. A resource that is there and was not asked for is kept: it limits the sidecar, and nothing else.
func filled(wanted, there corev1.ResourceList) corev1.ResourceList {
	out := maps.Clone(there)
	if len(wanted) > 0 && out == nil {
		out = corev1.ResourceList{}
	}
	maps.Copy(out, wanted)
	return out
}
