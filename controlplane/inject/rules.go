package inject

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	xdsnames "github.com/mantlet/mantlet/xds/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// mighty are capabilities with which a container can take the redirect away, or send past it.
var mighty = map[string]string{
	"ALL":             "it can take the redirect to its sidecar away",
	"NET_ADMIN":       "it can take the redirect to its sidecar away",
	"NET_RAW":         "it can send packets past its sidecar",
	"SYS_ADMIN":       "it can enter other namespaces and run past its sidecar",
	"SYS_MODULE":      "it can change the kernel",
	"SYS_RAWIO":       "it can change the kernel",
	"DAC_READ_SEARCH": "it can read the node's files, other pods' keys among them",
	"BPF":             "it can attach programs that pass its sidecar by",
}

// inspect finds what would defeat enforcement in a pod.
func inspect(pod *corev1.Pod, allowed map[string]bool) []Reason {
	spec := field.NewPath("spec")
	var reasons []Reason
	if pod.Spec.HostPID && !allowed[names.AllowHostPID] {
		reasons = append(reasons, Reason{spec.Child("hostPID").String(), "the pod sees the sidecar's processes, and those of the whole node", orAllow("remove it", names.AllowHostPID)})
	}
	if s := pod.Spec.ShareProcessNamespace; s != nil && *s && !allowed[names.AllowSharedProcesses] {
		reasons = append(reasons, Reason{spec.Child("shareProcessNamespace").String(), "apps could reach into the sidecar's processes, where its key is", orAllow("remove it", names.AllowSharedProcesses)})
	}
	reasons = append(reasons, reservedVolumes(pod)...)
	reasons = append(reasons, tokens(pod)...)
	if !allowed[names.AllowHostPath] {
		reasons = append(reasons, hostPaths(pod)...)
	}
	for i := range pod.Spec.InitContainers {
		if c := &pod.Spec.InitContainers[i]; c.Name != names.Container { // that one is replaced
			reasons = append(reasons, inspectContainer(pod, c, spec.Child("initContainers").Index(i), allowed)...)
		}
	}
	for i := range pod.Spec.Containers {
		reasons = append(reasons, inspectContainer(pod, &pod.Spec.Containers[i], spec.Child("containers").Index(i), allowed)...)
	}
	return append(reasons, inspectEphemeral(pod, allowed)...)
}

// InspectEphemeral says what the debugging containers of a pod that has a sidecar would do to it, or nil.
func InspectEphemeral(pod *corev1.Pod, ns Namespace) error {
	if !HasSidecar(pod) {
		return nil
	}
	allowed, _ := ns.allowed()
	if reasons := inspectEphemeral(pod, allowed); len(reasons) > 0 {
		return &Refusal{Pod: podName(pod, ns), Reasons: reasons}
	}
	return nil
}

// HasSidecar reports whether a pod has the container that enforces.
func HasSidecar(pod *corev1.Pod) bool {
	i := sidecarIn(pod.Spec.InitContainers)
	if i < 0 {
		return false
	}
	r := pod.Spec.InitContainers[i].RestartPolicy
	return r != nil && *r == corev1.ContainerRestartPolicyAlways
}

func inspectEphemeral(pod *corev1.Pod, allowed map[string]bool) (reasons []Reason) {
	for i := range pod.Spec.EphemeralContainers {
		e := &pod.Spec.EphemeralContainers[i]
		at := field.NewPath("spec", "ephemeralContainers").Index(i)
		c := corev1.Container(e.EphemeralContainerCommon)
		reasons = append(reasons, inspectContainer(pod, &c, at, allowed)...)
		if e.TargetContainerName == names.Container && !allowed[names.AllowSharedProcesses] {
			reasons = append(reasons, Reason{at.Child("targetContainerName").String(), "it would share the sidecar's processes, where its key is",
				orAllow("name another container", names.AllowSharedProcesses)})
		}
	}
	return reasons
}

func inspectContainer(pod *corev1.Pod, c *corev1.Container, at *field.Path, allowed map[string]bool) (reasons []Reason) {
	refuse := func(at *field.Path, text, hint string) {
		reasons = append(reasons, Reason{fmt.Sprintf("%s (container %s)", at, c.Name), text, hint})
	}
	if c.Name == names.Container {
		refuse(at.Child("name"), "the name is the sidecar's", "give it another name")
	}
	if u := effectiveUser(pod, c); u != nil && (proxyuser.Pod.HasID(*u) || usersOf(pod).HasID(*u)) && !allowed[names.AllowProxyUser] {
		refuse(at.Child("securityContext", "runAsUser"),
			fmt.Sprintf("user %d is one of those that sidecars run as (%s), and the pod's own sidecar's connections are not redirected", *u, usersOf(pod)),
			orAllow("use another user", names.AllowProxyUser))
	}
	if s := c.SecurityContext; s != nil && !allowed[names.AllowCapabilities] {
		if s.Privileged != nil && *s.Privileged {
			refuse(at.Child("securityContext", "privileged"), mighty["ALL"], orAllow("remove it", names.AllowCapabilities))
		}
		if s.Capabilities != nil {
			for _, add := range s.Capabilities.Add {
				if why, ok := mighty[capability(add)]; ok {
					refuse(at.Child("securityContext", "capabilities", "add"), fmt.Sprintf("with %s %s", add, why), orAllow("remove it", names.AllowCapabilities))
				}
			}
		}
	}
	for i, p := range c.Ports {
		captures := p.ContainerPort == xdsnames.InboundPort || p.ContainerPort == xdsnames.OutboundPort
		if captures && (p.Protocol == "" || p.Protocol == corev1.ProtocolTCP) {
			refuse(at.Child("ports").Index(i).Child("containerPort"), fmt.Sprintf("the sidecar captures connections at TCP port %d", p.ContainerPort),
				"let the app listen at another one")
		}
	}
	for i, m := range c.VolumeMounts {
		if reserved(m.Name) {
			refuse(at.Child("volumeMounts").Index(i).Child("name"), fmt.Sprintf("volume %s is the sidecar's, with what proves who the pod is", m.Name), "do not mount it")
		}
	}
	return reasons
}

// reservedVolumes refuses volumes with the sidecar's names in a pod that has no sidecar yet; those of a sidecar are replaced.
func reservedVolumes(pod *corev1.Pod) (reasons []Reason) {
	if sidecarIn(pod.Spec.InitContainers) >= 0 {
		return nil
	}
	for i, v := range pod.Spec.Volumes {
		if reserved(v.Name) {
			at := field.NewPath("spec", "volumes").Index(i).Child("name")
			reasons = append(reasons, Reason{at.String(), "the name " + v.Name + " is the sidecar's", "give the volume another name"})
		}
	}
	return reasons
}

// tokens refuses volumes of any other name with what proves to the control plane who the pod is: with that an app would get the pod's
// certificate itself, and could speak for the pod without its sidecar.
func tokens(pod *corev1.Pod) (reasons []Reason) {
	for i, v := range pod.Spec.Volumes {
		if v.Projected == nil || reserved(v.Name) { // those are the sidecar's, or refused by their name
			continue
		}
		for j, s := range v.Projected.Sources {
			if t := s.ServiceAccountToken; t != nil && t.Audience == names.TokenAudience {
				at := field.NewPath("spec", "volumes").Index(i).Child("projected", "sources").Index(j).Child("serviceAccountToken", "audience")
				reasons = append(reasons, Reason{at.String(), "a token for " + names.TokenAudience + " proves who the pod is, which only its sidecar is to do", "use another audience"})
			}
		}
	}
	return reasons
}

func reserved(volume string) bool {
	return slices.Contains([]string{names.RunVolume, names.RootVolume, names.TokenVolume}, volume)
}

// effectiveUser is whom a container runs as; nil: its image says.
func effectiveUser(pod *corev1.Pod, c *corev1.Container) *int64 {
	if c.SecurityContext != nil && c.SecurityContext.RunAsUser != nil {
		return c.SecurityContext.RunAsUser
	}
	if pod.Spec.SecurityContext != nil {
		return pod.Spec.SecurityContext.RunAsUser
	}
	return nil
}

// capability writes a capability as the kernel's headers do, without CAP_. Container runtimes take either, in any case.
func capability(c corev1.Capability) string {
	return strings.TrimPrefix(strings.ToUpper(string(c)), "CAP_")
}

func orAllow(what, word string) string {
	return fmt.Sprintf("%s, or let the namespace allow it by the annotation %s: %s", what, names.AllowAnnotation, word)
}

// enforceLevel is the namespace label of Pod Security admission, by which pods are refused.
const enforceLevel = "pod-security.kubernetes.io/enforce"

// podSecurity refuses where Pod Security admission would: baseline and restricted allow no NET_ADMIN. That admission comes later, and
// would blame a container that the person never wrote.
func (c Config) podSecurity(ns Namespace) []Reason {
	level := ns.Labels[enforceLevel]
	if c.Capture == CaptureNode || c.PodSecurity == PodSecurityIgnored || level == "" || level == "privileged" {
		return nil
	}
	return []Reason{{
		Text: fmt.Sprintf("namespace %s has Pod Security level %s, which forbids NET_ADMIN, and a sidecar that captures traffic itself needs it", ns.Name, level),
		Hint: "install Mantlet with capture=node, where pods need no capability, or label the namespace " + enforceLevel + ": privileged",
	}}
}

// ownUsers refuses pods in a user namespace of their own where the node captures: its daemon sees the sidecar as a user that is none of the pod's, and
// would not let it pass, so that the pod would never start.
func (c Config) ownUsers(pod *corev1.Pod) []Reason {
	if c.Capture != CaptureNode || usersOf(pod) == proxyuser.Pod {
		return nil
	}
	return []Reason{{Field: "spec.hostUsers", Text: "in node mode a pod with users of its own would not start: the node's daemon cannot tell its sidecar",
		Hint: "remove it, or install Mantlet with capture=sidecar"}}
}

// defaultCapabilities warns of containers that may be root, or become it, with what container runtimes give by default. A container that is not root has
// no capability at first. One that executes a setuid file of root's gets what its bounding set holds (capabilities(7)), which is what was not dropped;
// allowPrivilegeEscalation: false (no_new_privs) has such files executed as any other.
func defaultCapabilities(pod *corev1.Pod, ns Namespace, allowed map[string]bool) (warnings []string) {
	if allowed[names.AllowCapabilities] {
		return nil
	}
	var root, becomes []string
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			switch c := &list[i]; {
			case c.Name == names.Container || drops(c, "NET_RAW", "SETUID"):
			case mayBeRoot(pod, c):
				root = append(root, c.Name)
			case mayEscalate(c):
				becomes = append(becomes, c.Name)
			}
		}
	}
	// API servers may cut a warning at 256 characters.
	if len(root) > 0 {
		warnings = append(warnings, fmt.Sprintf("pod %s: container %s may run as root with NET_RAW or SETUID, by either of which it could bypass its sidecar: "+
			"set runAsNonRoot and allowPrivilegeEscalation: false, or drop: [ALL] and add what it needs", podName(pod, ns), strings.Join(root, ", ")))
	}
	if len(becomes) > 0 {
		warnings = append(warnings, fmt.Sprintf("pod %s: container %s may become root by a setuid file, if there is one, and bypass its sidecar by NET_RAW or SETUID: "+
			"set allowPrivilegeEscalation: false, or drop: [ALL] and add what it needs", podName(pod, ns), strings.Join(becomes, ", ")))
	}
	return warnings
}

// mayEscalate reports whether setuid files and file capabilities count for a container, as they do unless it says otherwise.
func mayEscalate(c *corev1.Container) bool {
	s := c.SecurityContext
	return s == nil || s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation
}

func mayBeRoot(pod *corev1.Pod, c *corev1.Container) bool {
	if u := effectiveUser(pod, c); u != nil {
		return *u == 0
	}
	nonRoot := pod.Spec.SecurityContext != nil && pod.Spec.SecurityContext.RunAsNonRoot != nil && *pod.Spec.SecurityContext.RunAsNonRoot
	if c.SecurityContext != nil && c.SecurityContext.RunAsNonRoot != nil {
		nonRoot = *c.SecurityContext.RunAsNonRoot
	}
	return !nonRoot
}

// drops reports whether a container gives up all of some capabilities.
func drops(c *corev1.Container, wanted ...string) bool {
	if c.SecurityContext == nil || c.SecurityContext.Capabilities == nil {
		return false
	}
	has := func(list []corev1.Capability, name string) bool {
		return slices.ContainsFunc(list, func(c corev1.Capability) bool { return capability(c) == name })
	}
	caps := c.SecurityContext.Capabilities
	for _, name := range wanted {
		if has(caps.Add, name) || !has(caps.Drop, name) && !has(caps.Drop, "ALL") {
			return false
		}
	}
	return true
}
