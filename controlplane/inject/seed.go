package inject

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// Seed is a pod's seed where the same pod is to get the same bytes each time: a digest of its namespace, its name and its containers, images included,
// but for the sidecar. So an image cannot name the user that goes with it by digest. Whoever knows the manifest can compute the user, and knows it before
// an image is made that is named by a tag; and all replicas of a workload share it. A webhook draws at random instead.
func Seed(pod *corev1.Pod, ns Namespace) (seed proxyuser.Seed) {
	others := slices.DeleteFunc(append([]corev1.Container{}, pod.Spec.InitContainers...), func(c corev1.Container) bool { return c.Name == names.Container })
	b, err := json.Marshal(struct {
		Namespace, Name            string
		InitContainers, Containers []corev1.Container
	}{ns.Name, pod.Name + "/" + pod.GenerateName, others, pod.Spec.Containers})
	if err != nil {
		panic(fmt.Sprintf("inject: marshal containers: %v", err)) // types that always can be
	}
	sum := sha256.Sum256(b)
	copy(seed[:], sum[:])
	return seed
}
