package inject

import (
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
)

// tampered says how the sidecar that a pod has is another than the one that it is to have, or "". There are webhooks that do to any container what
// the pod's annotations say, and those are its author's: so all is compared that decides what the sidecar does. They may add environment, and tokens
// below secretsDir, as the identity webhooks of clouds do to every container.
func tampered(pod, wanted *corev1.Pod) string {
	have, want := &pod.Spec.InitContainers[0], &wanted.Spec.InitContainers[0]
	same := equality.Semantic.DeepEqual
	switch {
	case have.Image != want.Image, !slices.Equal(have.Command, want.Command), !slices.Equal(have.Args, want.Args), have.WorkingDir != want.WorkingDir,
		!same(have.SecurityContext, want.SecurityContext), !same(have.StartupProbe, want.StartupProbe):
		return "the sidecar is not the one that was injected"
	case !same(have.Lifecycle, want.Lifecycle):
		return "the sidecar has got a command of somebody else's to run (lifecycle)"
	case len(have.VolumeDevices) > 0 || !mountsOf(have, want):
		return "the sidecar's volume mounts are not those that were injected"
	case len(have.EnvFrom) > 0 || !environmentOf(have, want):
		return "the sidecar's environment is not the one that was injected"
	}
	for _, v := range pod.Spec.Volumes {
		i := slices.IndexFunc(wanted.Spec.Volumes, func(w corev1.Volume) bool { return w.Name == v.Name })
		if reserved(v.Name) && (i < 0 || !same(v, wanted.Spec.Volumes[i])) {
			return "volume " + v.Name + " is not the one that was injected"
		}
	}
	return ""
}

// secretsDir is where Kubernetes, and others like it, have containers' tokens.
const secretsDir = "/var/run/secrets/"

// mountsOf reports whether all that is wanted is mounted, and nothing else but tokens in places of their own.
func mountsOf(have, want *corev1.Container) bool {
	for _, m := range want.VolumeMounts {
		if !slices.ContainsFunc(have.VolumeMounts, func(h corev1.VolumeMount) bool { return equality.Semantic.DeepEqual(h, m) }) {
			return false
		}
	}
	for _, h := range have.VolumeMounts {
		if slices.ContainsFunc(want.VolumeMounts, func(m corev1.VolumeMount) bool { return equality.Semantic.DeepEqual(h, m) }) {
			continue
		}
		at := path.Clean(h.MountPath) + "/"
		if !strings.HasPrefix(at, secretsDir) || at == secretsDir || slices.ContainsFunc(want.VolumeMounts, func(m corev1.VolumeMount) bool {
			ours := path.Clean(m.MountPath) + "/"
			return strings.HasPrefix(ours, at) || strings.HasPrefix(at, ours)
		}) {
			return false
		}
	}
	return true
}

// environmentOf reports whether all that is wanted is there, and nothing else by which a program loads code of somebody else's (ld.so(8)).
func environmentOf(have, want *corev1.Container) bool {
	for _, e := range have.Env {
		i := slices.IndexFunc(want.Env, func(w corev1.EnvVar) bool { return w.Name == e.Name })
		switch {
		case i >= 0 && !equality.Semantic.DeepEqual(e, want.Env[i]), i < 0 && strings.HasPrefix(e.Name, "LD_"):
			return false
		}
	}
	return !slices.ContainsFunc(want.Env, func(w corev1.EnvVar) bool {
		return !slices.ContainsFunc(have.Env, func(e corev1.EnvVar) bool { return e.Name == w.Name })
	})
}
