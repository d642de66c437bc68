package inject

import (
	"bytes"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

func nodeConfig() Config {
	c := testConfig()
	c.Capture = CaptureNode
	return c
}

func injectedAs(t *testing.T, pod *corev1.Pod, cfg Config, seed proxyuser.Seed) (*corev1.Pod, *corev1.SecurityContext) {
	t.Helper()
	got, err := Inject(pod, shop, cfg, seed)
	if err != nil {
		t.Fatal(err)
	}
	return got.Pod, got.Pod.Spec.InitContainers[0].SecurityContext
}

func appPod() *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "app", Image: "x"}}}}
}

// The seed alone says as whom a sidecar runs, not who wrote the pod, and not a sidecar that is there.
func TestUserIsOfTheSeed(t *testing.T) {
	first, second := testSeed, proxyuser.Seed{7: 3, 15: 4}
	pod, s := injectedAs(t, appPod(), nodeConfig(), first)
	if want := proxyuser.Pod.User(first); *s.RunAsUser != int64(want.UID) || *s.RunAsGroup != int64(want.GID) || !*s.RunAsNonRoot {
		t.Errorf("the sidecar is user %d, group %d, not %s", *s.RunAsUser, *s.RunAsGroup, want)
	}
	_, s = injectedAs(t, pod, nodeConfig(), second)
	if want := proxyuser.Pod.User(second); *s.RunAsUser != int64(want.UID) || *s.RunAsGroup != int64(want.GID) {
		t.Errorf("injected again the sidecar is user %d, group %d: whoever wrote the pod has chosen it", *s.RunAsUser, *s.RunAsGroup)
	}
	if a, b := pod.Annotations[names.InjectedAnnotation], hashOf(t, nodeConfig()); a != b {
		t.Errorf("the hash %s is not that of the configuration, %s", a, b)
	}

	_, s = injectedAs(t, appPod(), testConfig(), first)
	if *s.RunAsUser != 0 || *s.RunAsGroup != 0 {
		t.Errorf("a sidecar that captures traffic itself is user %d", *s.RunAsUser)
	}
	enclosed := appPod()
	enclosed.Spec.HostUsers = new(false)
	if _, err := Inject(enclosed, shop, nodeConfig(), first); err == nil || !strings.Contains(err.Error(), "spec.hostUsers: in node mode") {
		t.Errorf("a pod with users of its own, in node mode: %v", err)
	}
	injectedAs(t, enclosed, testConfig(), first)
	if _, err := Inject(appPod(), shop, nodeConfig(), proxyuser.Seed{}); err == nil {
		t.Error("without a seed everybody's sidecar would be the same user, and it passes")
	}
}

func hashOf(t *testing.T, c Config) string {
	t.Helper()
	h, err := c.Hash()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// Any user that Inject may have drawn passes, and nobody else.
func TestVerifyUser(t *testing.T) {
	for name, c := range map[string]struct {
		uid, gid *int64
		refused  bool
	}{
		"another one's":           {new(int64(2_000_000_000)), new(int64(2_134_217_727)), false},
		"a user before":           {new(int64(1_999_999_999)), new(int64(2_000_000_000)), true},
		"a user behind":           {new(int64(2_134_217_728)), new(int64(2_000_000_000)), true},
		"a group before":          {new(int64(2_000_000_000)), new(int64(1_999_999_999)), true},
		"the first and no group":  {new(int64(2_000_000_000)), nil, true},
		"no user":                 {nil, new(int64(2_000_000_000)), true},
		"whoever the image says":  {nil, nil, true},
		"root":                    {new(int64(0)), new(int64(0)), true},
		"the fixed one of once":   {new(int64(15150)), new(int64(15150)), true},
		"more than there are":     {new(int64(1<<32 + 2_000_000_000)), new(int64(2_000_000_000)), true},
		"one of hostUsers: false": {new(int64(20_000)), new(int64(20_000)), true},
	} {
		pod, s := injectedAs(t, appPod(), nodeConfig(), testSeed)
		s.RunAsUser, s.RunAsGroup = c.uid, c.gid
		if err := Verify(pod, shop, nodeConfig()); (err != nil) != c.refused {
			t.Errorf("%s: %v, want refused: %t", name, err, c.refused)
		}
	}
	pod, s := injectedAs(t, appPod(), testConfig(), testSeed)
	s.RunAsUser, s.RunAsGroup = new(int64(2_000_000_000)), new(int64(2_000_000_000))
	if Verify(pod, shop, testConfig()) == nil {
		t.Error("a sidecar that captures traffic itself, and is not root, passes")
	}
}

// Apps may not be one of the users that sidecars run as, in the container's words or the pod's; their groups are no matter.
func TestAppsAreNoProxies(t *testing.T) {
	for _, cfg := range []Config{testConfig(), nodeConfig()} {
		for name, c := range map[string]struct {
			change  func(*corev1.PodSpec)
			refused bool
		}{
			"the first": {func(s *corev1.PodSpec) { s.Containers[0].SecurityContext = as(2_000_000_000) }, true},
			"the last":  {func(s *corev1.PodSpec) { s.Containers[0].SecurityContext = as(2_134_217_727) }, true},
			"before":    {func(s *corev1.PodSpec) { s.Containers[0].SecurityContext = as(1_999_999_999) }, false},
			"behind":    {func(s *corev1.PodSpec) { s.Containers[0].SecurityContext = as(2_134_217_728) }, false},
			"the pod": {func(s *corev1.PodSpec) {
				s.SecurityContext = &corev1.PodSecurityContext{RunAsUser: new(int64(2_012_345_678))}
			}, true},
			"the pod, not really": {func(s *corev1.PodSpec) {
				s.SecurityContext = &corev1.PodSecurityContext{RunAsUser: new(int64(2_012_345_678))}
				s.Containers[0].SecurityContext = as(1000)
			}, false},
			"an init container": {func(s *corev1.PodSpec) {
				s.InitContainers = []corev1.Container{{Name: "setup", SecurityContext: as(2_012_345_678)}}
			}, true},
			"a group": {func(s *corev1.PodSpec) {
				s.Containers[0].SecurityContext = &corev1.SecurityContext{RunAsGroup: new(int64(2_012_345_678))}
			}, false},
			"a common user":         {func(s *corev1.PodSpec) { s.Containers[0].SecurityContext = as(30_000) }, false},
			"enclosed":              {func(s *corev1.PodSpec) { s.HostUsers = new(false); s.Containers[0].SecurityContext = as(30_000) }, true},
			"enclosed, a usual one": {func(s *corev1.PodSpec) { s.HostUsers = new(false); s.Containers[0].SecurityContext = as(65_532) }, false},
		} {
			pod := appPod()
			c.change(&pod.Spec)
			if cfg.Capture == CaptureNode && pod.Spec.HostUsers != nil {
				continue // refused for that
			}
			_, err := Inject(pod, shop, cfg, testSeed)
			if (err != nil) != c.refused || err != nil && !strings.Contains(err.Error(), "is one of those that sidecars run as") {
				t.Errorf("%s, capture %s: %v, want refused: %t", name, cfg.Capture, err, c.refused)
			}
		}
	}
}

func as(uid int64) *corev1.SecurityContext { return &corev1.SecurityContext{RunAsUser: &uid} }

// The same manifest gives the same user, once and again; whatever an image could know of itself does not give it away.
func TestSeed(t *testing.T) {
	base := Seed(appPod(), shop)
	if base != Seed(appPod(), shop) {
		t.Error("the same pod has two seeds")
	}
	pod, _ := injectedAs(t, appPod(), nodeConfig(), base)
	if Seed(pod, shop) != base {
		t.Error("once it is injected the pod has another seed")
	}
	again, err := Inject(pod, shop, nodeConfig(), Seed(pod, shop))
	if err != nil || len(again.Patch) > 0 || !bytes.Equal(asJSON(t, again.Pod), asJSON(t, pod)) {
		t.Errorf("injected again: %v, %s", err, asJSON(t, again.Patch))
	}
	seen := map[proxyuser.Seed]string{base: "nothing"}
	for what, change := range map[string]func(*corev1.Pod, *Namespace){
		"namespace":      func(_ *corev1.Pod, ns *Namespace) { ns.Name = "other" },
		"name":           func(p *corev1.Pod, _ *Namespace) { p.Name = "api" },
		"generated name": func(p *corev1.Pod, _ *Namespace) { p.Name, p.GenerateName = "", "web" },
		"image":          func(p *corev1.Pod, _ *Namespace) { p.Spec.Containers[0].Image = "x@sha256:01" },
		"a container": func(p *corev1.Pod, _ *Namespace) {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "b"})
		},
		"an init container": func(p *corev1.Pod, _ *Namespace) { p.Spec.InitContainers = []corev1.Container{{Name: "b"}} },
	} {
		p, ns := appPod(), shop
		change(p, &ns)
		s := Seed(p, ns)
		if as, ok := seen[s]; ok {
			t.Errorf("another %s changes as much as %s", what, as)
		}
		seen[s] = what
	}
}
