package inject

import (
	"errors"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
)

// What webhooks that run after ours may do to a sidecar, and what not.
func TestTampered(t *testing.T) {
	injected, err := Inject(&corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}}}, shop, testConfig(), testSeed)
	if err != nil {
		t.Fatal(err)
	}
	mount := func(at string) func(*corev1.Pod, *corev1.Container) {
		return func(_ *corev1.Pod, c *corev1.Container) {
			c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "x", MountPath: at})
		}
	}
	environment := func(name string) func(*corev1.Pod, *corev1.Container) {
		return func(_ *corev1.Pod, c *corev1.Container) {
			c.Env = append(c.Env, corev1.EnvVar{Name: name, Value: "x"})
		}
	}
	for name, c := range map[string]struct {
		change  func(*corev1.Pod, *corev1.Container)
		refused bool
	}{
		"nothing":                   {func(*corev1.Pod, *corev1.Container) {}, false},
		"the service account":       {mount(serviceAccountDir), false},
		"a cloud's token":           {mount("/var/run/secrets/cloud.example/token"), false},
		"environment":               {environment("REGION"), false},
		"other resources":           {func(_ *corev1.Pod, c *corev1.Container) { c.Resources.Limits = corev1.ResourceList{} }, false},
		"another image":             {func(_ *corev1.Pod, c *corev1.Container) { c.Image = "evil" }, true},
		"other binaries":            {mount("/usr/local/bin"), true},
		"another loader":            {mount("/etc/ld.so.preload"), true},
		"everything":                {mount("/"), true},
		"another root":              {mount(names.RootDir + "/"), true},
		"another token":             {mount(names.TokenDir + "/.."), true},
		"a file for the token":      {mount(names.TokenDir + "/" + names.TokenFile), true},
		"all of the secrets":        {mount("/var/run/secrets/"), true},
		"out of the secrets":        {mount("/var/run/secrets/../../../lib"), true},
		"the run directory is gone": {func(_ *corev1.Pod, c *corev1.Container) { c.VolumeMounts = c.VolumeMounts[1:] }, true},
		"code by environment":       {environment("LD_PRELOAD"), true},
		"another pod's name":        {func(_ *corev1.Pod, c *corev1.Container) { c.Env[0] = corev1.EnvVar{Name: "POD_NAME", Value: "x"} }, true},
		"the pod's name twice":      {environment("POD_NAME"), true},
		"no name":                   {func(_ *corev1.Pod, c *corev1.Container) { c.Env = c.Env[1:] }, true},
		"environment from elsewhere": {func(_ *corev1.Pod, c *corev1.Container) {
			c.EnvFrom = []corev1.EnvFromSource{{Prefix: "LD_"}}
		}, true},
		"a hook": {func(_ *corev1.Pod, c *corev1.Container) {
			c.Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"envoy"}}}}
		}, true},
		"no hook": {func(_ *corev1.Pod, c *corev1.Container) { c.Lifecycle = nil }, true},
		"a probe that ends it": {func(_ *corev1.Pod, c *corev1.Container) {
			c.StartupProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"envoy"}}}}
		}, true},
		"another volume": {func(p *corev1.Pod, _ *corev1.Container) {
			p.Spec.Volumes[0].EmptyDir, p.Spec.Volumes[0].HostPath = nil, &corev1.HostPathVolumeSource{Path: "/"}
		}, true},
	} {
		pod := injected.Pod.DeepCopy()
		c.change(pod, &pod.Spec.InitContainers[0])
		err := Verify(pod, shop, testConfig())
		if (err != nil) != c.refused {
			t.Errorf("%s: got %v, want refused: %t", name, err, c.refused)
		}
		if is := new(Refusal); errors.As(err, &is) && is.Passing {
			t.Errorf("%s: it would not pass later either: %v", name, err)
		}
	}
}

// While Mantlet is upgraded a pod may be injected by one version and verified by the other.
func TestVerifiedByAnotherVersion(t *testing.T) {
	next := testConfig()
	next.Image = "registry.example/mantlet@sha256:02"
	injected, err := Inject(&corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}}}, shop, testConfig(), testSeed)
	if err != nil {
		t.Fatal(err)
	}
	var is *Refusal
	if err := Verify(injected.Pod, shop, next); !errors.As(err, &is) || !is.Passing || !strings.Contains(err.Error(), "create the pod again") {
		t.Errorf("got %v", err)
	}
	again, err := Inject(injected.Pod, shop, next, testSeed)
	if err != nil {
		t.Fatal(err)
	}
	if err := Verify(again.Pod, shop, next); err != nil {
		t.Errorf("created again: %v", err)
	}
}
