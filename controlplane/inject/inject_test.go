package inject

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	jsonpatch "gopkg.in/evanphx/json-patch.v4"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity/attest"
)

var shop = Namespace{Name: "shop", Labels: map[string]string{policy.InjectLabel: enabled}}

// randomPod is a pod that is not refused, with the lists that injection changes in all their shapes.
func randomPod(r *rand.Rand) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}}
	if r.IntN(2) == 0 {
		p.Annotations = map[string]string{"a/~b": "1", policy.SidecarAnnotation: "no"}
	}
	if r.IntN(4) == 0 {
		p.Annotations = map[string]string{}
	}
	for i := range r.IntN(3) {
		p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: "init" + string(rune('a'+i)), Image: "x"})
	}
	if r.IntN(3) == 0 { // one that somebody else wrote, anywhere
		p.Spec.InitContainers = slices.Insert(p.Spec.InitContainers, r.IntN(len(p.Spec.InitContainers)+1), corev1.Container{Name: names.Container, Image: "evil"})
		for _, v := range []string{names.RootVolume, names.RunVolume} {
			if r.IntN(2) == 0 {
				p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: v, VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/"}}})
			}
		}
	}
	for i := range 1 + r.IntN(3) {
		p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "app" + string(rune('a'+i)), Image: "x"})
	}
	if r.IntN(2) == 0 {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: "data"})
	}
	return p
}

func TestInjectProperties(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 0))
		pod := randomPod(r)
		before := pod.DeepCopy()
		got, err := Inject(pod, shop, testConfig(), testSeed)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if !equality.Semantic.DeepEqual(pod, before) {
			t.Fatalf("seed %d: the pod that was given has changed: %s", seed, cmp.Diff(before, pod))
		}
		if got.Pod.Spec.InitContainers[0].Name != names.Container || !HasSidecar(got.Pod) {
			t.Fatalf("seed %d: the sidecar is not the first init container", seed)
		}
		if !equality.Semantic.DeepEqual(got.Pod.Spec.Containers, before.Spec.Containers) {
			t.Fatalf("seed %d: app containers were touched", seed)
		}
		others := func(p *corev1.Pod) []corev1.Container {
			return slices.DeleteFunc(slices.Clone(p.Spec.InitContainers), func(c corev1.Container) bool { return c.Name == names.Container })
		}
		if !equality.Semantic.DeepEqual(others(got.Pod), others(before)) {
			t.Fatalf("seed %d: other init containers were touched", seed)
		}
		wantContainer(t, got.Pod)
		checkPatch(t, seed, before, got)

		same, err := Inject(pod, shop, testConfig(), testSeed)
		if err != nil || !bytes.Equal(asJSON(t, same.Patch), asJSON(t, got.Patch)) {
			t.Fatalf("seed %d: the same pod got another patch (%v)", seed, err)
		}
		again, err := Inject(got.Pod, shop, testConfig(), testSeed)
		if err != nil || len(again.Patch) != 0 || !bytes.Equal(asJSON(t, again.Pod), asJSON(t, got.Pod)) {
			t.Fatalf("seed %d: injected again it changes: %v %s", seed, err, asJSON(t, again.Patch))
		}
	}
}

// Whatever was there before, what is injected is what the configuration says.
func wantContainer(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	cfg, err := testConfig().complete()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(cfg.sidecar(), pod.Spec.InitContainers[0], cmp.Comparer(func(a, b resource.Quantity) bool { return a.Cmp(b) == 0 })); diff != "" {
		t.Fatalf("sidecar: %s", diff)
	}
	for _, v := range cfg.volumes() {
		if !slices.ContainsFunc(pod.Spec.Volumes, func(have corev1.Volume) bool { return equality.Semantic.DeepEqual(have, v) }) {
			t.Fatalf("volume %s is missing or another: %+v", v.Name, pod.Spec.Volumes)
		}
	}
}

func checkPatch(t *testing.T, seed uint64, before *corev1.Pod, got Result) {
	t.Helper()
	patch, err := jsonpatch.DecodePatch(asJSON(t, got.Patch))
	if err != nil {
		t.Fatal(err)
	}
	patched, err := patch.Apply(asJSON(t, before))
	if err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	if !jsonpatch.Equal(patched, asJSON(t, got.Pod)) {
		t.Fatalf("seed %d: the patch makes\n%s\nand not\n%s", seed, patched, asJSON(t, got.Pod))
	}
}

// What the API server's own plugins add to the sidecar does not make it another, so that webhooks that are invoked again agree.
func TestReinvocation(t *testing.T) {
	pod := &corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}}}
	first, err := Inject(pod, shop, testConfig(), testSeed)
	if err != nil {
		t.Fatal(err)
	}
	c := &first.Pod.Spec.InitContainers[0]
	c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "kube-api-access-abcde", ReadOnly: true, MountPath: serviceAccountDir})
	c.Resources.Limits[corev1.ResourceCPU] = c.Resources.Requests[corev1.ResourceCPU]
	second, err := Inject(first.Pod, shop, testConfig(), testSeed)
	if err != nil || len(second.Patch) != 0 {
		t.Errorf("got %v and patch %s, want none", err, asJSON(t, second.Patch))
	}
	// Anything else does.
	c.Image = "registry.example/other"
	c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "x", MountPath: "/x"})
	third, err := Inject(first.Pod, shop, testConfig(), testSeed)
	if err != nil || len(third.Patch) != 1 || third.Patch[0].Path != "/spec/initContainers/0" {
		t.Errorf("got %v and patch %s, want the sidecar replaced", err, asJSON(t, third.Patch))
	}
}

func TestEphemeral(t *testing.T) {
	injected, err := Inject(&corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app"}}}}, shop, testConfig(), testSeed)
	if err != nil {
		t.Fatal(err)
	}
	debug := func(change func(*corev1.EphemeralContainer)) *corev1.Pod {
		p := injected.Pod.DeepCopy()
		e := corev1.EphemeralContainer{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debugger", Image: "x"}}
		change(&e)
		p.Spec.EphemeralContainers = append(p.Spec.EphemeralContainers, e)
		return p
	}
	admin := debug(func(e *corev1.EphemeralContainer) {
		e.SecurityContext = &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"net_admin"}}}
	})
	for name, c := range map[string]struct {
		pod     *corev1.Pod
		ns      Namespace
		refused bool
	}{
		"harmless":                {debug(func(*corev1.EphemeralContainer) {}), shop, false},
		"NET_ADMIN":               {admin, shop, true},
		"NET_ADMIN, allowed":      {admin, Namespace{Name: "shop", Annotations: map[string]string{names.AllowAnnotation: "capabilities"}}, false},
		"the sidecar's processes": {debug(func(e *corev1.EphemeralContainer) { e.TargetContainerName = names.Container }), shop, true},
		"no sidecar":              {&corev1.Pod{Spec: corev1.PodSpec{EphemeralContainers: admin.Spec.EphemeralContainers}}, shop, false},
	} {
		if err := InspectEphemeral(c.pod, c.ns); (err != nil) != c.refused {
			t.Errorf("%s: got %v, want refused: %t", name, err, c.refused)
		}
	}
}

func TestAsked(t *testing.T) {
	for _, c := range []struct {
		annotation, label, namespace string
		byDefault, want, wrong       bool
	}{
		{"", "", "shop", false, false, false},
		{"", enabled, "shop", false, true, false},
		{"", disabled, "shop", true, false, false},
		{"", "", "shop", true, true, false},
		{"", "on", "shop", false, false, false},
		{no, enabled, "shop", true, false, false},
		{yes, "", "shop", false, true, false},
		{yes, disabled, "shop", false, true, false},
		{"", required, "shop", false, true, false},
		{yes, required, "shop", false, true, false},
		{no, required, "shop", false, false, true},
		{no, required, "kube-system", false, false, false},
		{"yes", enabled, "shop", false, false, true},
		{"", enabled, "kube-system", true, false, false},
		{"", "", "mantlet-system", true, false, false},
		{yes, enabled, "kube-system", true, false, false},
	} {
		pod, ns := &corev1.Pod{}, Namespace{Name: c.namespace}
		if c.annotation != "" {
			pod.Annotations = map[string]string{policy.InjectLabel: c.annotation}
		}
		if c.label != "" {
			ns.Labels = map[string]string{policy.InjectLabel: c.label}
		}
		cfg := testConfig()
		cfg.Default, cfg.System = c.byDefault, []string{"mantlet-system"}
		if got, err := cfg.asked(pod, ns); got != c.want || (err != nil) != c.wrong {
			t.Errorf("%+v: got %t, %v", c, got, err)
		}
		// Whoever writes a container of the sidecar's name asks for a sidecar, and cannot opt out beside it.
		pod.Spec.InitContainers = []corev1.Container{{Name: "first"}, {Name: names.Container}}
		system := cfg.IsSystem(c.namespace)
		out := c.annotation != "" && c.annotation != yes
		if got, err := cfg.asked(pod, ns); got != (!system && !out) || (err != nil) != (!system && out) {
			t.Errorf("%+v, with a container of the sidecar's name: got %t, %v", c, got, err)
		}
	}
}

// Where no policy applies there is nothing to require.
func TestRequiredOfOthers(t *testing.T) {
	for name, spec := range map[string]corev1.PodSpec{"hostNetwork": {HostNetwork: true}, "Windows": {OS: &corev1.PodOS{Name: corev1.Windows}}} {
		pod := &corev1.Pod{Spec: spec}
		pod.Annotations = map[string]string{policy.InjectLabel: no}
		r, err := Inject(pod, Namespace{Name: "shop", Labels: map[string]string{policy.InjectLabel: required}}, testConfig(), testSeed)
		if err != nil || r.Left == "" {
			t.Errorf("%s: left %q, %v", name, r.Left, err)
		}
	}
}

func TestNames(t *testing.T) {
	if names.TokenAudience != attest.Audience {
		t.Errorf("the token's audience is %q, and the control plane asks for %q", names.TokenAudience, attest.Audience)
	}
}

func TestConfig(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"image": func(c *Config) { c.Image = "" }, "address": func(c *Config) { c.ControlPlane = "mantlet" }, "capture": func(c *Config) { c.Capture = "pod" },
		"podSecurity": func(c *Config) { c.PodSecurity = "on" }, "concurrency": func(c *Config) { c.Concurrency = -1 },
	} {
		c := testConfig()
		change(&c)
		if c.Check() == nil {
			t.Errorf("a wrong %s passes", name)
		}
	}
}
