package webhook

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/inject"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/identity/ca"
	"github.com/mantlet/mantlet/install"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/apitest"
	"github.com/mantlet/mantlet/xds/proxyuser"
)

// patience bounds what a busy machine may take for the API server to hear of a change.
const patience = 60 * time.Second

// world is a real API server with an installation whose webhooks this process serves, with the rights that the installation gives.
type world struct {
	t      testing.TB
	config *rest.Config
	api    *kubernetes.Clientset

	mu       sync.Mutex
	warnings []string
}

// HandleWarningHeader implements rest.WarningHandler.
func (w *world) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.warnings = append(w.warnings, text)
}

func (w *world) warned() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	text := strings.Join(w.warnings, "\n")
	w.warnings = nil
	return text
}

func newWorld(t testing.TB) *world {
	t.Helper()
	s := apitest.Start(t, cluster.APIServerOptions{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	w := &world{t: t, config: apitest.Config(t, s)}
	w.config.QPS, w.config.WarningHandler = -1, w
	var err error
	if w.api, err = kubernetes.NewForConfig(w.config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.api.RESTClient().(*rest.RESTClient).Client.CloseIdleConnections)
	return w
}

// install applies what `mantlet install` writes, as kubectl apply --server-side does; the webhooks are at an address instead of the Service,
// since nothing here leads to that.
func (w *world) install(address string) map[string]string {
	w.t.Helper()
	list, err := install.Render(install.Options{Set: []string{"image=registry.example/mantlet@sha256:01"}})
	if err != nil {
		w.t.Fatal(err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(discovery.NewDiscoveryClientForConfigOrDie(w.config)))
	client, err := dynamic.NewForConfig(w.config)
	if err != nil {
		w.t.Fatal(err)
	}
	versions := map[string]string{}
	for _, m := range list {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(m.Text, &o.Object); err != nil {
			w.t.Fatal(err)
		}
		if hooks, ok := o.Object["webhooks"].([]any); ok {
			for _, h := range hooks {
				c := h.(map[string]any)["clientConfig"].(map[string]any)
				path := c["service"].(map[string]any)["path"].(string)
				c["url"] = "https://" + address + path
				delete(c, "service")
			}
		}
		gvk := o.GroupVersionKind()
		mapping, err := mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
		if err != nil {
			w.t.Fatal(err)
		}
		var r dynamic.ResourceInterface = client.Resource(mapping.Resource)
		if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
			r = client.Resource(mapping.Resource).Namespace(m.Namespace)
		}
		text, err := o.MarshalJSON()
		if err != nil {
			w.t.Fatal(err)
		}
		got, err := r.Patch(w.t.Context(), m.Name, types.ApplyPatchType, text, metav1.PatchOptions{FieldManager: "kubectl"})
		if err != nil {
			w.t.Fatalf("apply %s %s: %v", m.Kind, m.Name, err)
		}
		versions[m.Kind+" "+m.Name] = got.GetResourceVersion()
	}
	return versions
}

// serve runs the webhooks and their bundle as the installed service account until the function is called.
func (w *world) serve(l net.Listener) (stop func()) {
	w.t.Helper()
	stop, _ = w.serveBy(l, testInject().Image)
	return stop
}

// serveBy does so as replicas of some images would: once they take turns each answers once, and the last of them all that comes then. Before that the first does.
func (w *world) serveBy(l net.Listener, images ...string) (stop, takeTurns func()) {
	w.t.Helper()
	td := spiffeid.RequireTrustDomainFromString(domain)
	authority, err := ca.New(ca.Config{TrustDomain: td})
	if err != nil {
		w.t.Fatal(err)
	}
	cert, err := authority.NewServer([]string{"mantlet.mantlet-system.svc"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")})
	if err != nil {
		w.t.Fatal(err)
	}
	api := w.control()
	log := slog.New(slog.NewTextHandler(w.t.Output(), nil))
	var replicas []http.Handler
	var s *Server
	for _, image := range images {
		c := testInject()
		c.Image, c.System = image, []string{names.SystemNamespace, "kube-public", "kube-node-lease"}
		if s, err = New(Config{Inject: c, Namespaces: api.CoreV1().Namespaces(), Certificate: cert, Logger: log}); err != nil {
			w.t.Fatal(err)
		}
		replicas = append(replicas, s.Handler())
	}
	var turns atomic.Bool
	var answered atomic.Int64
	byTurns := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		turn := 1
		if turns.Load() {
			turn = int(answered.Add(1))
		}
		replicas[min(turn, len(replicas))-1].ServeHTTP(rw, r)
	})
	b := &Bundle{Name: names.WebhookConfiguration, Mutating: api.AdmissionregistrationV1().MutatingWebhookConfigurations(), Validating: api.AdmissionregistrationV1().ValidatingWebhookConfigurations(),
		Roots: func() ([]byte, error) { m, err := authority.Material(); return m.Roots, err }, Logger: log}
	ctx, cancel := context.WithCancel(w.t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		if err := s.serve(ctx, l, byTurns); err != nil {
			w.t.Error(err)
		}
	})
	group.Go(func() {
		if err := b.Run(ctx); err != nil {
			w.t.Error(err)
		}
	})
	return func() {
		cancel()
		group.Wait()
		api.RESTClient().(*rest.RESTClient).Client.CloseIdleConnections()
	}, func() { turns.Store(true) }
}

// control is a client with the name and the rights of the control plane.
func (w *world) control() *kubernetes.Clientset {
	w.t.Helper()
	as := rest.CopyConfig(w.config)
	as.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:mantlet-system:mantlet"}
	api, err := kubernetes.NewForConfig(as)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(api.RESTClient().(*rest.RESTClient).Client.CloseIdleConnections)
	return api
}

// await repeats a question until the answer is yes: the API server hears of configurations and namespaces by watching, as we do.
func (w *world) await(what string, ask func() error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			w.t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
	}
}

func (w *world) namespace(name string, labels map[string]string) {
	w.t.Helper()
	_, err := w.api.CoreV1().Namespaces().Create(w.t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = w.api.CoreV1().Namespaces().Update(w.t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}, metav1.UpdateOptions{})
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// create asks for a pod; change may be nil.
func (w *world) create(namespace string, o metav1.CreateOptions, change func(*corev1.Pod)) (*corev1.Pod, error) {
	one := int64(1000)
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{GenerateName: "web-"}, Spec: corev1.PodSpec{ServiceAccountName: "default", Containers: []corev1.Container{{
		Name: "app", Image: "web:1", SecurityContext: &corev1.SecurityContext{RunAsUser: &one}}}}}
	if change != nil {
		change(p)
	}
	return w.api.CoreV1().Pods(namespace).Create(w.t.Context(), p, o)
}

func annotated(value string) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.Annotations = map[string]string{policy.InjectLabel: value} }
}

func hostNetwork(p *corev1.Pod) { p.Spec.HostNetwork = true }

func hostPath(path string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{{Name: "node", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path}}}}
	}
}

func listen(t testing.TB, address string) net.Listener {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A real API server, the installation as `mantlet install` writes it, with no more rights than that gives: who gets a sidecar, who is
// refused and told why; what still works without Mantlet; and that it comes back by itself.
func TestAPIServer(t *testing.T) {
	w := newWorld(t)
	l := listen(t, "127.0.0.1:0")
	address := l.Addr().String()
	w.namespace("shop", map[string]string{policy.InjectLabel: "enabled"})
	w.namespace("must", map[string]string{policy.InjectLabel: names.InjectRequired})
	w.namespace("plain", nil)
	w.namespace("baseline", map[string]string{policy.InjectLabel: "enabled", "pod-security.kubernetes.io/enforce": "baseline"})
	t.Run("Pod Security", func(t *testing.T) { testPodSecurity(t, w) }) // before the webhooks, which make any sidecar that of their own configuration
	w.install(address)
	stop := w.serve(l)
	w.await("the webhooks are known", func() error {
		p, err := w.create("shop", metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}, nil)
		if err == nil {
			err = inject.Verify(p, inject.Namespace{Name: "shop", Labels: map[string]string{policy.InjectLabel: "enabled"}}, testInject())
		}
		return err
	})
	w.await("the guards are known", func() error {
		if _, err := w.create("must", metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}, annotated("false")); err == nil {
			return errors.New("a pod may opt out where sidecars are required")
		}
		return nil
	})
	t.Run("the roots, once they are written", func(t *testing.T) { testBundleRests(t, w) })
	t.Run("admission", func(t *testing.T) { testAdmission(t, w) })
	t.Run("tenant", func(t *testing.T) { testTenant(t, w) })
	t.Run("applied again", func(t *testing.T) {
		first, again := w.install(address), w.install(address)
		for name, version := range first {
			if again[name] != version {
				t.Errorf("%s has changed by being applied once more", name)
			}
		}
		if p, err := w.create("shop", metav1.CreateOptions{}, nil); err != nil || !inject.HasSidecar(p) {
			t.Errorf("afterwards a pod is created without sidecar, or not at all: %v", err)
		}
	})
	stop()
	t.Run("without Mantlet", func(t *testing.T) { testWithout(t, w) })
	t.Run("guarded without Mantlet", func(t *testing.T) { testGuarded(t, w) })
	stop = w.serve(listen(t, address)) // with another authority: its roots have to get into the configurations
	w.await("it is back", func() error {
		_, err := w.create("shop", metav1.CreateOptions{}, nil)
		return err
	})
	stop()
	t.Run("upgraded", func(t *testing.T) { testUpgraded(t, w, address) })
}

// A pod that one version injects and another one verifies is created all the same: its client comes again by itself.
func testUpgraded(t *testing.T, w *world, address string) {
	const next = "registry.example/mantlet@sha256:02"
	stop, takeTurns := w.serveBy(listen(t, address), testInject().Image, next)
	defer stop()
	w.await("it is back once more", func() error {
		_, err := w.create("shop", metav1.CreateOptions{}, nil)
		return err
	})
	takeTurns()
	p, err := w.create("shop", metav1.CreateOptions{}, nil)
	if err != nil || p.Spec.InitContainers[0].Image != next {
		t.Errorf("injected by one version and verified by the next: %+v, %v", p.Spec.InitContainers, err)
	}
}

func testInject() inject.Config {
	return inject.Config{Image: "registry.example/mantlet@sha256:01", ControlPlane: "mantlet.mantlet-system.svc:15012", TrustDomain: spiffeid.RequireTrustDomainFromString(domain)}
}

func testAdmission(t *testing.T, w *world) {
	w.namespace("kube-system", map[string]string{policy.InjectLabel: "enabled", corev1.LabelMetadataName: "kube-system"})
	privileged := func(p *corev1.Pod) { p.Spec.Containers[0].SecurityContext.Privileged = new(true) }
	for _, c := range []struct {
		name, namespace string
		change          func(*corev1.Pod)
		injected        bool
		refused, warned string
	}{
		{name: "a pod", namespace: "shop", injected: true},
		{name: "opted out", namespace: "shop", change: annotated("false")},
		{name: "opted in", namespace: "plain", change: annotated("true"), injected: true},
		{name: "nobody asks", namespace: "plain"},
		{name: "no such value", namespace: "plain", change: annotated("yes"), refused: `supported values: "true", "false"`},
		{name: "privileged", namespace: "shop", change: privileged, refused: "take the redirect to its sidecar away"},
		{name: "required", namespace: "must", injected: true},
		{name: "required, opted in", namespace: "must", change: annotated("true"), injected: true},
		{name: "required, opted out", namespace: "must", change: annotated("false"), refused: "namespace must has the label mantlet.dev/inject: required"},
		{name: "required, opted out, host network", namespace: "must", change: func(p *corev1.Pod) { annotated("false")(p); hostNetwork(p) }},
		{name: "required, host network", namespace: "must", change: hostNetwork, warned: "to which NetworkPolicy does not apply"},
		{name: "host network", namespace: "shop", change: hostNetwork, warned: "to which NetworkPolicy does not apply"},
		{name: "the node's files", namespace: "shop", change: hostPath("/var/run/"), refused: "with /run of the node the pod gets past sidecars"},
		{name: "harmless files of the node", namespace: "shop", change: hostPath("/srv/data"), injected: true},
		{name: "Pod Security", namespace: "baseline", refused: "capture=node"},
		{name: "system namespace", namespace: "kube-system"},
		{name: "own namespace", namespace: names.SystemNamespace, change: restricted},
	} {
		w.warned()
		p, err := w.create(c.namespace, metav1.CreateOptions{}, c.change)
		warned := w.warned()
		switch {
		case c.refused != "" && (err == nil || !strings.Contains(err.Error(), c.refused)):
			t.Errorf("%s: got %v, want %q in it", c.name, err, c.refused)
		case c.refused == "" && err != nil:
			t.Errorf("%s: %v", c.name, err)
		case c.refused == "" && inject.HasSidecar(p) != c.injected:
			t.Errorf("%s: sidecar: %t, want %t", c.name, !c.injected, c.injected)
		case !strings.Contains(warned, c.warned):
			t.Errorf("%s: warned %q, want %q", c.name, warned, c.warned)
		}
		if c.refused != "" {
			t.Log(err)
		}
	}

	p, err := w.create("shop", metav1.CreateOptions{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.Spec.EphemeralContainers = []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Name: "debug", Image: "x",
		SecurityContext: &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{"NET_ADMIN"}}}}}}
	if _, err := w.api.CoreV1().Pods("shop").UpdateEphemeralContainers(t.Context(), p.Name, p, metav1.UpdateOptions{}); err == nil || !strings.Contains(err.Error(), "with NET_ADMIN") {
		t.Errorf("a debugging container with NET_ADMIN: %v", err)
	}
	p.Spec.EphemeralContainers[0].SecurityContext = nil
	if _, err := w.api.CoreV1().Pods("shop").UpdateEphemeralContainers(t.Context(), p.Name, p, metav1.UpdateOptions{}); err != nil {
		t.Errorf("a debugging container: %v", err)
	}

	w.warned()
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "a", Annotations: map[string]string{policy.PolicyModeAnnotation: "audit"}}}
	if _, err := w.api.NetworkingV1().NetworkPolicies("shop").Create(t.Context(), np, metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
	if got := w.warned(); !strings.Contains(got, "mantlet cannot enforce this") {
		t.Errorf("a policy that cannot be enforced: warned %q", got)
	}
	everyPod := []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{}}}
	np = &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "dns"}, Spec: networkingv1.NetworkPolicySpec{
		Egress: []networkingv1.NetworkPolicyEgressRule{{To: everyPod, Ports: []networkingv1.NetworkPolicyPort{{Protocol: new(corev1.ProtocolUDP)}}}}}}
	if _, err := w.api.NetworkingV1().NetworkPolicies("shop").Create(t.Context(), np, metav1.CreateOptions{}); err != nil {
		t.Error(err)
	}
	if got := w.warned(); !strings.Contains(got, "not authenticated: spec.egress[0].ports[0]") || strings.Contains(got, "\n") {
		t.Errorf("a policy over UDP: warned %q", got)
	}
}

// restricted is what the namespace of the installation demands.
func restricted(p *corev1.Pod) {
	s := p.Spec.Containers[0].SecurityContext
	s.RunAsNonRoot, s.AllowPrivilegeEscalation = new(true), new(false)
	s.Capabilities, s.SeccompProfile = &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}, &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}
}

// What Pod Security admission says of the sidecars themselves: what Inject refuses in advance would be refused, and with node capture
// even restricted accepts them.
func testPodSecurity(t *testing.T, w *world) {
	for _, c := range []struct {
		level   string
		capture inject.Capture
		want    bool
	}{
		{"privileged", inject.CaptureSidecar, true}, {"baseline", inject.CaptureSidecar, false}, {"restricted", inject.CaptureSidecar, false},
		{"privileged", inject.CaptureNode, true}, {"baseline", inject.CaptureNode, true}, {"restricted", inject.CaptureNode, true},
	} {
		in := "level-" + c.level
		w.namespace(in, map[string]string{"pod-security.kubernetes.io/enforce": c.level})
		cfg := testInject()
		cfg.Capture, cfg.Default = c.capture, true
		var injected error
		_, err := w.create(in, metav1.CreateOptions{}, func(p *corev1.Pod) {
			restricted(p)
			var r inject.Result
			if r, injected = inject.Inject(p, inject.Namespace{Name: in}, cfg, proxyuser.Seed{1}); injected == nil {
				*p = *r.Pod
			}
		})
		if injected != nil {
			t.Fatal(injected)
		}
		if got := err == nil; got != c.want {
			t.Errorf("level %s, capture %s: %v", c.level, c.capture, err)
		}
	}
}

// Without Mantlet nothing that asks for a sidecar starts; all that the cluster needs to come back does.
func testWithout(t *testing.T, w *world) {
	if _, err := w.create("shop", metav1.CreateOptions{}, nil); err == nil || !strings.Contains(err.Error(), "failed calling webhook") {
		t.Errorf("a pod that asks for a sidecar: %v", err)
	}
	if _, err := w.create("plain", metav1.CreateOptions{}, annotated("true")); err == nil {
		t.Error("a pod that asks for a sidecar itself is created")
	}
	if _, err := w.create("must", metav1.CreateOptions{}, annotated("false")); err == nil || !strings.Contains(err.Error(), "may go without") {
		t.Errorf("a pod that opts out where sidecars are required: %v", err)
	}
	for name, err := range map[string]error{
		"Mantlet's own namespace": second(w.create(names.SystemNamespace, metav1.CreateOptions{}, restricted)),
		"kube-system":             second(w.create("kube-system", metav1.CreateOptions{}, nil)),
		"another namespace":       second(w.create("plain", metav1.CreateOptions{}, nil)),
		"host network":            second(w.create("shop", metav1.CreateOptions{}, hostNetwork)),
		"opted out":               second(w.create("shop", metav1.CreateOptions{}, annotated("false"))),
	} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := w.api.NetworkingV1().NetworkPolicies("shop").Create(t.Context(), &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "b"}}, metav1.CreateOptions{}); err != nil {
		t.Errorf("a policy: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }
