package install

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"sigs.k8s.io/yaml"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/settings"
)

const image = "image=registry.example:5000/mantlet@sha256:01"

func render(t *testing.T, o Options) []Manifest {
	t.Helper()
	o.Set = append([]string{image}, o.Set...)
	list, err := Render(o)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// Every object is one that the API's types know, field by field, and none carries what makes server-side apply own too much.
func TestTypes(t *testing.T) {
	for _, o := range []Options{{}, {Namespace: "shield", Set: []string{"injectByDefault=true", "imagePullSecrets=[a]", "controlPlane.tolerations=[{operator: Exists}]", "podNetworks=[10.0.0.0/8]"}}} {
		for _, m := range render(t, o) {
			into, ok := map[string]any{
				"Namespace": &corev1.Namespace{}, "ServiceAccount": &corev1.ServiceAccount{}, "ConfigMap": &corev1.ConfigMap{}, "Service": &corev1.Service{},
				"ClusterRole": &rbacv1.ClusterRole{}, "ClusterRoleBinding": &rbacv1.ClusterRoleBinding{}, "Role": &rbacv1.Role{}, "RoleBinding": &rbacv1.RoleBinding{},
				"NetworkPolicy": &networkingv1.NetworkPolicy{}, "PodDisruptionBudget": &policyv1.PodDisruptionBudget{}, "Deployment": &appsv1.Deployment{},
				"MutatingWebhookConfiguration": &admissionregistrationv1.MutatingWebhookConfiguration{}, "ValidatingWebhookConfiguration": &admissionregistrationv1.ValidatingWebhookConfiguration{},
				"ValidatingAdmissionPolicy": &admissionregistrationv1.ValidatingAdmissionPolicy{}, "ValidatingAdmissionPolicyBinding": &admissionregistrationv1.ValidatingAdmissionPolicyBinding{},
			}[m.Kind]
			if !ok {
				t.Errorf("%s %s: a kind that nobody expects", m.Kind, m.Name)
				continue
			}
			if err := yaml.UnmarshalStrict(m.Text, into); err != nil {
				t.Errorf("%s %s: %v\n%s", m.Kind, m.Name, err, m.Text)
			}
			for _, never := range []string{"creationTimestamp", "status:", "caBundle:", "<no value>"} {
				if bytes.Contains(m.Text, []byte(never)) {
					t.Errorf("%s %s has %s", m.Kind, m.Name, never)
				}
			}
			clusterScoped := slices.Contains([]string{"Namespace", "ClusterRole", "ClusterRoleBinding", "MutatingWebhookConfiguration", "ValidatingWebhookConfiguration", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}, m.Kind)
			if want := "shield"; o.Namespace == want && !clusterScoped && m.Namespace != want || clusterScoped && m.Namespace != "" {
				t.Errorf("%s %s is in namespace %q", m.Kind, m.Name, m.Namespace)
			}
			if o.Namespace == "shield" && bytes.Contains(m.Text, []byte("mantlet-system")) {
				t.Errorf("%s %s speaks of another namespace:\n%s", m.Kind, m.Name, m.Text)
			}
		}
	}
}

// The chart is for clusters whose API server knows all kinds that it brings, by what k8s.io/api says of when they came.
func TestKubeVersion(t *testing.T) {
	newest := 0
	for _, m := range render(t, Options{Set: []string{"capture=node"}}) {
		var o any
		switch m.Kind {
		case "ValidatingAdmissionPolicy":
			o = new(admissionregistrationv1.ValidatingAdmissionPolicy)
		case "ValidatingAdmissionPolicyBinding":
			o = new(admissionregistrationv1.ValidatingAdmissionPolicyBinding)
		case "PodDisruptionBudget":
			o = new(policyv1.PodDisruptionBudget)
		}
		if came, ok := o.(interface{ APILifecycleIntroduced() (int, int) }); ok {
			_, minor := came.APILifecycleIntroduced()
			newest = max(newest, minor)
		}
	}
	text, err := chart.ReadFile("chart/Chart.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var c struct {
		KubeVersion string `json:"kubeVersion"`
	}
	if err := yaml.Unmarshal(text, &c); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf(">=1.%d.0-0", newest); c.KubeVersion != want {
		t.Errorf("kubeVersion is %s, and what is in the chart needs %s", c.KubeVersion, want)
	}
}

func find[T any](t *testing.T, list []Manifest, kind string) *T {
	t.Helper()
	i := slices.IndexFunc(list, func(m Manifest) bool { return m.Kind == kind })
	if i < 0 {
		t.Fatalf("no %s", kind)
	}
	o := new(T)
	if err := yaml.UnmarshalStrict(list[i].Text, o); err != nil {
		t.Fatal(err)
	}
	return o
}

func TestDeterministic(t *testing.T) {
	a, b := render(t, Options{}), render(t, Options{})
	if !slices.EqualFunc(a, b, func(x, y Manifest) bool { return bytes.Equal(x.Text, y.Text) }) {
		t.Error("two renderings differ")
	}
}

func asYAML(t *testing.T, v any) []byte {
	t.Helper()
	b, err := yaml.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// What the control plane reads is what the values say.
func TestSettings(t *testing.T) {
	list := render(t, Options{Values: [][]byte{[]byte("sidecar: {concurrency: 3}\nmtls: strict"), []byte("mtls: permissive")}, Set: []string{"injectByDefault=true", `controlPlane.nodeSelector.example\.com/pool=infra`}})
	s, err := settings.Read([]byte(find[corev1.ConfigMap](t, list, "ConfigMap").Data["settings.yaml"]))
	if err != nil {
		t.Fatal(err)
	}
	if s.Sidecar.Concurrency != 3 || s.MTLS != "permissive" || !s.InjectByDefault || s.Sidecar.Resources.Limits.Memory().String() != "512Mi" || s.Namespace != names.SystemNamespace {
		t.Errorf("settings: %+v", s)
	}
	d := find[appsv1.Deployment](t, list, "Deployment")
	if d.Spec.Template.Spec.NodeSelector["example.com/pool"] != "infra" || d.Spec.Template.Spec.NodeSelector["kubernetes.io/os"] != "linux" {
		t.Errorf("node selector: %v", d.Spec.Template.Spec.NodeSelector)
	}
	// Its pods are made anew when the settings change, and only then.
	again := render(t, Options{Set: []string{"injectByDefault=true", "sidecar.concurrency=3"}})
	other := render(t, Options{Set: []string{"injectByDefault=true", "sidecar.concurrency=2"}})
	hash := func(l []Manifest) string {
		return find[appsv1.Deployment](t, l, "Deployment").Spec.Template.Annotations["mantlet.dev/settings"]
	}
	if hash(list) != hash(again) || hash(list) == hash(other) {
		t.Errorf("hashes %s, %s, %s", hash(list), hash(again), hash(other))
	}
}

func TestNames(t *testing.T) {
	list := render(t, Options{})
	svc := find[corev1.Service](t, list, "Service")
	d := find[appsv1.Deployment](t, list, "Deployment")
	m := find[admissionregistrationv1.MutatingWebhookConfiguration](t, list, "MutatingWebhookConfiguration")
	ports := d.Spec.Template.Spec.Containers[0].Ports
	if svc.Name != names.Service || svc.Spec.Ports[0].Port != names.ServicePort || ports[0].ContainerPort != names.ServicePort || ports[1].ContainerPort != names.WebhookPort || ports[2].ContainerPort != names.HealthPort ||
		m.Name != names.WebhookConfiguration || m.Webhooks[0].ClientConfig.Service.Name != names.Service {
		t.Error("the manifests and package names differ")
	}
	all := string(bytes.Join(texts(list), nil))
	for _, name := range []string{"'" + names.RootConfigMap + "'", names.CASecret, names.RetiredSecret, "'" + names.Container + "'", "'" + names.AllowAnnotation + "'", "'" + names.AllowExec + "'"} {
		if !strings.Contains(all, name) {
			t.Errorf("%s is not in the manifests", name)
		}
	}
}

func texts(list []Manifest) (out [][]byte) {
	for _, m := range list {
		out = append(out, m.Text)
	}
	return out
}

// refused is a case of testdata/refused.yaml, which a test of the chart has Helm refuse too.
type refused struct {
	Name   string   `json:"name"`
	Set    []string `json:"set"`
	Values string   `json:"values"`
	Want   string   `json:"want"`
}

func TestRefused(t *testing.T) {
	text, err := os.ReadFile("testdata/refused.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var cases []refused
	if err := yaml.UnmarshalStrict(text, &cases); err != nil || len(cases) == 0 {
		t.Fatalf("%d cases: %v", len(cases), err)
	}
	for _, c := range cases {
		if _, err := Render(Options{Set: c.Set, Values: [][]byte{[]byte(c.Values)}}); err == nil || c.Want == "" || !strings.Contains(err.Error(), c.Want) {
			t.Errorf("%s: got %v, want %q in it", c.Name, err, c.Want)
		}
	}
}

// The daemon is there where it has work, in a namespace that lets it.
func TestNodeCapture(t *testing.T) {
	for capture, want := range map[string]int{"sidecar": 0, "node": 1} {
		list, err := Render(Options{Set: []string{image, "capture=" + capture}})
		if err != nil {
			t.Fatal(err)
		}
		daemons := 0
		for _, m := range list {
			if m.Kind == "DaemonSet" {
				daemons++
			}
			if m.Kind == "Namespace" && strings.Contains(string(m.Text), "enforce: privileged") != (want == 1) {
				t.Errorf("capture %s: the namespace is\n%s", capture, m.Text)
			}
		}
		if daemons != want {
			t.Errorf("capture %s: %d DaemonSets, want %d", capture, daemons, want)
		}
	}
}

// Where the plugin is to be removed the daemon's place is taken by what removes it, with all that it has of the node.
func TestPluginRemoved(t *testing.T) {
	daemon := func(o ...string) appsv1.DaemonSetSpec {
		return find[appsv1.DaemonSet](t, render(t, Options{Set: append([]string{"capture=node"}, o...)}), "DaemonSet").Spec
	}
	keeps, removes := daemon(), daemon("node.plugin=removed")
	args := &removes.Template.Spec.Containers[0].Args
	if !slices.Equal((*args)[:2], []string{"uninstall", "--stay"}) {
		t.Fatalf("the arguments are %q", *args)
	}
	*args = (*args)[2:]
	if removes.MinReadySeconds == 0 {
		t.Error("a node where the plugin cannot be removed would count as done")
	}
	removes.MinReadySeconds = 0
	if !bytes.Equal(asYAML(t, keeps), asYAML(t, removes)) {
		t.Errorf("the daemon is\n%s\nand what removes the plugin\n%s", asYAML(t, keeps), asYAML(t, removes))
	}
}

// An empty list of peers in a NetworkPolicy is everybody; as a value it is nobody. What is refused is in testdata/refused.yaml.
func TestMetricsFrom(t *testing.T) {
	rules := func(set ...string) []networkingv1.NetworkPolicyIngressRule {
		for _, m := range render(t, Options{Set: set}) {
			if m.Kind == "NetworkPolicy" && m.Name == "control-plane" {
				var p networkingv1.NetworkPolicy
				if err := yaml.UnmarshalStrict(m.Text, &p); err != nil {
					t.Fatal(err)
				}
				return p.Spec.Ingress
			}
		}
		t.Fatal("no NetworkPolicy of the control plane")
		return nil
	}
	scraped := func(rules []networkingv1.NetworkPolicyIngressRule) (from [][]networkingv1.NetworkPolicyPeer) {
		for _, r := range rules {
			if len(r.Ports) == 0 || slices.ContainsFunc(r.Ports, func(p networkingv1.NetworkPolicyPort) bool { return p.Port.IntValue() == names.HealthPort }) {
				from = append(from, r.From)
			}
		}
		return from
	}
	for _, set := range [][]string{nil, {"metrics.from=[]"}} {
		if from := scraped(rules(set...)); len(from) != 0 {
			t.Errorf("%q: metrics are read by %v", set, from)
		}
	}
	from := scraped(rules("metrics.from=[{namespaceSelector: {matchLabels: {team: ops}}, podSelector: {}}, {ipBlock: {cidr: 192.0.2.0/24}}]"))
	if len(from) != 1 || len(from[0]) != 2 || from[0][0].NamespaceSelector.MatchLabels["team"] != "ops" || from[0][0].PodSelector == nil || from[0][1].IPBlock.CIDR != "192.0.2.0/24" {
		t.Errorf("metrics are read by %+v", from)
	}
}

// The daemon's limit is for as many pods as a kubelet runs by default, each with a process.
func TestNodeMemory(t *testing.T) {
	const pods, daemon, each = 110, 256 << 20, 16 << 20
	r := find[appsv1.DaemonSet](t, render(t, Options{Set: []string{"capture=node"}}), "DaemonSet").Spec.Template.Spec.Containers[0].Resources
	if got := r.Limits.Memory().Value(); got < daemon+pods*each {
		t.Errorf("the limit is %d bytes, and %d pods take up to %d", got, pods, daemon+pods*each)
	}
	if r.Requests.Memory().Cmp(*r.Limits.Memory()) > 0 || r.Requests.Memory().IsZero() || !r.Limits.Cpu().IsZero() {
		t.Errorf("resources: %+v", r)
	}
	other := find[appsv1.DaemonSet](t, render(t, Options{Set: []string{"capture=node", "node.resources.limits.memory=4Gi"}}), "DaemonSet").Spec.Template.Spec.Containers[0].Resources
	if other.Limits.Memory().String() != "4Gi" || other.Requests.Memory().Cmp(*r.Requests.Memory()) != 0 {
		t.Errorf("resources by value: %+v", other)
	}
}
