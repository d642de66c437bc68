package install

import (
	"cmp"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"
)

var update = flag.Bool("update", false, "rewrite the wanted files of the goldens")

const beforeReason = "  #"

// What Mantlet may do in a cluster, in either capture mode, is in testdata/rbac.txt: a line for each rule and for each who has it, with the
// reason. One that is not there, or has no reason, fails. With -update what is new is written down without one.
func TestRights(t *testing.T) {
	const file = "testdata/rbac.txt"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	reasons, wanted := map[string]string{}, []string{}
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		right, reason, _ := strings.Cut(strings.TrimSpace(line), beforeReason)
		reasons[right] = strings.TrimSpace(reason)
		wanted = append(wanted, right)
	}
	got := rights(t)
	if *update {
		out := "# What Mantlet may do in a cluster: capture modes, role, rule, and who needs it for what. go test ./install -update adds and removes lines.\n"
		for _, right := range got {
			out += strings.TrimSpace(right+beforeReason+" "+reasons[right]) + "\n"
		}
		if err := os.WriteFile(file, []byte(out), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	for _, right := range got {
		switch reason, known := reasons[right]; {
		case !known:
			t.Errorf("a right that %s does not have (-update adds it; its reason you have to write):\n%s", file, right)
		case reason == "":
			t.Errorf("%s does not say who needs this, and for what:\n%s", file, right)
		}
	}
	for _, right := range wanted {
		if !slices.Contains(got, right) {
			t.Errorf("%s has a right that is not in the manifests (-update takes it out):\n%s", file, right)
		}
	}
}

// rights are all rules and bindings, in the order of the manifests, each with the capture modes that have it; and in which pods a token of the
// account is.
func rights(t *testing.T) (out []string) {
	t.Helper()
	modes := map[string][]string{}
	for _, capture := range []string{"sidecar", "node"} {
		for _, m := range render(t, Options{Set: []string{"capture=" + capture}}) {
			for _, right := range rightsOf(t, m) {
				if len(modes[right]) == 0 {
					out = append(out, right)
				}
				modes[right] = append(modes[right], capture)
			}
		}
	}
	for i, right := range out {
		out[i] = fmt.Sprintf("%-12s  %s", strings.Join(modes[right], ","), right)
	}
	return out
}

func rightsOf(t *testing.T, m Manifest) (out []string) {
	t.Helper()
	switch m.Kind {
	case "ClusterRole":
		r := read[rbacv1.ClusterRole](t, m)
		if r.AggregationRule != nil {
			t.Errorf("ClusterRole %s gathers rules of other roles, which nobody sees here", m.Name)
		}
		out = rules(m, r.Rules)
	case "Role":
		out = rules(m, read[rbacv1.Role](t, m).Rules)
	case "ClusterRoleBinding":
		b := read[rbacv1.ClusterRoleBinding](t, m)
		out = bindings(m, b.RoleRef, b.Subjects)
	case "RoleBinding":
		b := read[rbacv1.RoleBinding](t, m)
		out = bindings(m, b.RoleRef, b.Subjects)
	case "Deployment":
		out = tokens(m, read[appsv1.Deployment](t, m).Spec.Template.Spec)
	case "DaemonSet":
		out = tokens(m, read[appsv1.DaemonSet](t, m).Spec.Template.Spec)
	}
	return out
}

func rules(m Manifest, list []rbacv1.PolicyRule) (out []string) {
	for _, r := range list {
		var on []string
		for _, group := range r.APIGroups {
			for _, resource := range r.Resources {
				on = append(on, strings.TrimPrefix(group+"/"+resource, "/"))
			}
		}
		on = append(on, r.NonResourceURLs...)
		right := fmt.Sprintf("%s %s: %s %s", m.Kind, m.Name, strings.Join(r.Verbs, ","), strings.Join(on, ","))
		if len(r.ResourceNames) > 0 {
			right += " named " + strings.Join(r.ResourceNames, ",")
		}
		out = append(out, right)
	}
	return out
}

func bindings(m Manifest, role rbacv1.RoleRef, subjects []rbacv1.Subject) (out []string) {
	for _, s := range subjects {
		out = append(out, fmt.Sprintf("%s %s: %s %s to %s %s/%s", m.Kind, m.Name, role.Kind, role.Name, s.Kind, s.Namespace, s.Name))
	}
	return out
}

// tokens says whose token the containers of a pod find: that of the account "default" where none is named.
func tokens(m Manifest, s corev1.PodSpec) []string {
	if s.AutomountServiceAccountToken != nil && !*s.AutomountServiceAccountToken {
		return []string{fmt.Sprintf("%s %s: no token", m.Kind, m.Name)}
	}
	return []string{fmt.Sprintf("%s %s: token of %s", m.Kind, m.Name, cmp.Or(s.ServiceAccountName, "default"))}
}

func read[T any](t *testing.T, m Manifest) *T {
	t.Helper()
	o := new(T)
	if err := yaml.UnmarshalStrict(m.Text, o); err != nil {
		t.Fatalf("%s %s: %v", m.Kind, m.Name, err)
	}
	return o
}

// A drain of nodes waits for the control plane's pods, all of them and no others: one stays where there is more than one, and a single one
// goes, as its node would never be empty.
func TestDisruptions(t *testing.T) {
	for _, replicas := range []int{1, 2, 3, 10} {
		list := render(t, Options{Set: []string{"capture=node", fmt.Sprintf("controlPlane.replicas=%d", replicas)}})
		budget, control, daemon := find[policyv1.PodDisruptionBudget](t, list, "PodDisruptionBudget"), find[appsv1.Deployment](t, list, "Deployment"), find[appsv1.DaemonSet](t, list, "DaemonSet")
		pods := selector(t, budget.Spec.Selector)
		if budget.Namespace != control.Namespace || pods.String() != selector(t, control.Spec.Selector).String() || !pods.Matches(labels.Set(control.Spec.Template.Labels)) {
			t.Errorf("the budget is for pods %s in %s, and the Deployment's are %v in %s", pods, budget.Namespace, control.Spec.Template.Labels, control.Namespace)
		}
		if pods.Matches(labels.Set(daemon.Spec.Template.Labels)) {
			t.Errorf("the budget %s counts the daemon's pods %v", pods, daemon.Spec.Template.Labels)
		}
		if budget.Spec.MinAvailable != nil || budget.Spec.MaxUnavailable == nil {
			t.Fatalf("the budget is %+v, and maxUnavailable is what this test reads", budget.Spec)
		}
		away, err := intstr.GetScaledValueFromIntOrPercent(budget.Spec.MaxUnavailable, replicas, true) // as the disruption controller does
		if err != nil {
			t.Fatal(err)
		}
		if int(*control.Spec.Replicas) != replicas || away < 1 || replicas > 1 && replicas-away < 1 {
			t.Errorf("of %d replicas, wanted %d, %d may be away", *control.Spec.Replicas, replicas, away)
		}
	}
}

func selector(t *testing.T, s *metav1.LabelSelector) labels.Selector {
	t.Helper()
	out, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
