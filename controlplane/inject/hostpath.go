package inject

import (
	"fmt"
	"path"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/mantlet/mantlet/controlplane/inject/names"
)

// nodePaths are files of the node that lead past sidecars, where they are unless somebody has put them elsewhere. Each is named by what a pod could do
// that has it, what is above it or what is below it. None is below another's.
var nodePaths = []struct{ path, why string }{
	{"/proc", "it leads into the processes of the whole node, sidecars among them"},
	{"/run/containerd", runtimeSocket}, {"/run/k3s", runtimeSocket}, {"/run/crio", runtimeSocket}, {"/run/podman", runtimeSocket},
	{"/run/docker.sock", runtimeSocket}, {"/run/docker", runtimeSocket}, {"/run/cri-dockerd.sock", runtimeSocket},
	{"/run/netns", "it has the network namespaces of the node's pods"},
	{"/run/mantlet", "it says which pods of the node are to be enforced"},
	{"/var/lib/kubelet", "it has the volumes of the node's pods, and with them their tokens and their sidecars' sockets"},
	{"/var/lib/containerd", runtimeState}, {"/var/lib/containers", runtimeState}, {"/var/lib/docker", runtimeState}, {"/var/lib/rancher", runtimeState},
	{"/etc/kubernetes", "it has the node's own credentials, and pods that the kubelet starts without asking anybody"},
	{"/etc/cni", "it says which network plugins close pods before they start"},
	{"/opt/cni", "it has the network plugins that close pods before they start"},
}

const (
	runtimeSocket = "by the container runtime's socket it can do anything to any pod of the node"
	runtimeState  = "it has the files of the node's containers, sidecars among them"
)

// hostPaths refuses volumes of the node's files by which a pod could get at sidecars, its own and others. Only the path as it is written is seen: where it
// is a symbolic link on the node, which a pod with some harmless hostPath could have put there, it leads elsewhere; so do claims of PersistentVolumes, which
// say what they are somewhere else. Pod Security (baseline) refuses hostPath as such.
func hostPaths(pod *corev1.Pod) (reasons []Reason) {
	for i, v := range pod.Spec.Volumes {
		if v.HostPath == nil || reserved(v.Name) { // those are replaced, or refused by their name
			continue
		}
		at := canonical(v.HostPath.Path)
		for _, n := range nodePaths {
			if within(at, n.path) || within(n.path, at) {
				field := field.NewPath("spec", "volumes").Index(i).Child("hostPath", "path")
				reasons = append(reasons, Reason{field.String(), fmt.Sprintf("with %s of the node the pod gets past sidecars: %s", at, n.why),
					orAllow("mount another path", names.AllowHostPath)})
				break
			}
		}
	}
	return reasons
}

// canonical is a node's path without what makes two texts of one path, /var/run being a link to /run (Filesystem Hierarchy Standard 3.0, 5.13).
func canonical(p string) string {
	p = path.Clean("/" + p)
	if within(p, "/var/run") {
		p = path.Clean("/run" + strings.TrimPrefix(p, "/var/run"))
	}
	return p
}

// within reports whether a clean path is another, or below it.
func within(p, of string) bool {
	return p == of || of == "/" || strings.HasPrefix(p, of+"/")
}
