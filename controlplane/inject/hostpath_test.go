package inject

import (
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
)

func TestHostPath(t *testing.T) {
	for path, refused := range map[string]bool{
		"/": true, "": true, "/run": true, "/var/run": true, "/var/run/": true, "/var": true, "/var/lib": true, "/etc": true, "/opt": true, "/opt/cni": true, "/proc": true, "/proc/1/root": true,
		"/run/containerd": true, "/run/containerd/containerd.sock": true, "/var/run/containerd/containerd.sock": true, "/run/crio/crio.sock": true, "/var/run/docker.sock": true,
		"/var/lib/kubelet/pods": true, "/var/lib/containerd": true, "/etc/cni/net.d": true, "/opt/cni/bin": true, "/etc/kubernetes/manifests": true, "/run/netns": true, "/run/mantlet/node": true,
		"/data/../run/containerd": true, "/data/../../..": true, "//run//containerd/": true, "/var/./run/docker.sock": true, "run/containerd": true, "/srv/../var/run": true,
		"/data": false, "/run/app": false, "/var/run/app": false, "/var/lib/app": false, "/run/containerd2": false, "/var/log": false, "/var/runner": false, "/procs": false, "/etc/app": false,
		"/var/lib/kubelet-backup": false, "/data/..app": false, "/run/containerd/../app": false,
	} {
		pod := &corev1.Pod{Spec: corev1.PodSpec{Volumes: []corev1.Volume{{Name: "a"}, {Name: "node", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}}}}}
		_, err := Inject(pod, shop, testConfig(), testSeed)
		refusal := new(Refusal)
		switch {
		case !refused && err != nil, refused && !errors.As(err, &refusal):
			t.Errorf("%q: %v, want refused: %t", path, err, refused)
		case refused && (!strings.Contains(err.Error(), "spec.volumes[1].hostPath.path: ") || !strings.Contains(err.Error(), "mantlet.dev/allow: host-path")):
			t.Errorf("%q: %v", path, err)
		}
		allows := shop
		allows.Annotations = map[string]string{names.AllowAnnotation: "host-pid, host-path"}
		if r, err := Inject(pod, allows, testConfig(), testSeed); err != nil || len(r.Warnings) != 0 && strings.Contains(r.Warnings[0], "allows nothing") {
			t.Errorf("%q, where the namespace allows it: %v %v", path, r.Warnings, err)
		}
	}
}
