package incluster

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

// patience bounds the wait for anything that is to come.
const patience = 2 * time.Minute

// place is a namespace of one test. Where a method finds something wrong the test ends.
type place struct {
	*testing.T
	*World
	name string
}

// newPlace makes a namespace whose pods get sidecars unless labels ("key=value") say otherwise. It goes when the test ends; if that failed, what is
// known of its pods is shown before.
func newPlace(t *testing.T, w *World, name string, labels ...string) place {
	t.Helper()
	p := place{T: t, World: w, name: name}
	if len(labels) == 0 {
		labels = []string{"mantlet.dev/inject=enabled"}
	}
	p.kubectl("create", "namespace", name)
	p.kubectl(slices.Concat([]string{"label", "--overwrite", "namespace", name}, labels)...)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		if t.Failed() {
			p.show(ctx)
		}
		if _, err := w.Cluster.Kubectl(ctx, "", "delete", "namespace", name, "--wait=false"); err != nil {
			t.Error(err)
		}
	})
	// The API server makes it a moment after the namespace, and refuses pods until then.
	err := Await(t.Context(), patience, func(ctx context.Context) error {
		_, err := w.Client.CoreV1().ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// show writes down what helps to find out why a test failed.
func (p place) show(ctx context.Context) {
	for _, args := range [][]string{
		{"-n", p.name, "get", "pods", "-o", "wide"},
		{"-n", p.name, "get", "events", "--sort-by=.lastTimestamp"},
		{"-n", "mantlet-system", "logs", "--tail=15", "-l", "app.kubernetes.io/name=mantlet"},
	} {
		out, err := p.Cluster.Kubectl(ctx, "", args...)
		p.Logf("kubectl %s\n%s%v", strings.Join(args, " "), out, err)
	}
	pods, err := p.Client.CoreV1().Pods(p.name).List(ctx, metav1.ListOptions{})
	if err != nil {
		p.Log(err)
		return
	}
	for _, pod := range pods.Items {
		out, err := p.Cluster.Kubectl(ctx, "", "-n", p.name, "logs", pod.Name, "-c", "mantlet-proxy", "--tail=15")
		p.Logf("sidecar of %s\n%s%v", pod.Name, out, err)
	}
}

// kubectl runs it in the namespace and returns what it writes.
func (p place) kubectl(args ...string) string {
	p.Helper()
	out, err := p.Cluster.Kubectl(p.Context(), "", slices.Concat([]string{"-n", p.name}, args)...)
	if err != nil {
		p.Fatal(err)
	}
	return out
}

// shorthand is what manifests in the tests may say.
var shorthand = strings.NewReplacer(
	"SERVER", Server, "CLIENT", Client, "CLAIMS", Claims,
	"SERVE", `image: "`+Server+`", args: [netexec, --http-port=8080], readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}`,
)

// apply applies manifests with shorthand to the namespace.
func (p place) apply(manifests ...string) {
	p.Helper()
	if err := p.tryApply(manifests...); err != nil {
		p.Fatal(err)
	}
}

func (p place) tryApply(manifests ...string) error {
	_, err := p.Cluster.Kubectl(p.Context(), shorthand.Replace(strings.Join(manifests, "\n---\n")), "-n", p.name, "apply", "-f", "-")
	return err
}

// server is a Deployment that serves its pods' names at port 8080, and its Service at port 80. Its pods have the label app.
func server(app string, replicas int) string {
	return fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: %[1]s}
spec:
  replicas: %[2]d
  selector: {matchLabels: {app: %[1]s}}
  template:
    metadata: {labels: {app: %[1]s}}
    spec: {terminationGracePeriodSeconds: 1, containers: [{name: app, SERVE}]}
---
apiVersion: v1
kind: Service
metadata: {name: %[1]s}
spec: {selector: {app: %[1]s}, ports: [{port: 80, targetPort: 8080}]}
`, app, replicas)
}

// client is a pod from which to try. Its label app is its name; more is for its spec, "nodeName: node1, ".
func client(name, more string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec: {%[2]sterminationGracePeriodSeconds: 1, containers: [{name: app, image: "CLIENT", args: [pause]}]}
`, name, more)
}

// labelled is a client whose label app is not its name.
func labelled(name, app, more string) string {
	return strings.Replace(client(name, more), "app: "+name, "app: "+app, 1)
}

// flooding is a client that tries addresses without end.
func flooding(name, more string, addresses ...string) string {
	return strings.Replace(client(name, more), "args: [pause]", `args: [flood, "`+strings.Join(addresses, `", "`)+`"]`, 1)
}

// admit is a NetworkPolicy by which pods app=to admit those with app=from, at TCP port 8080 alone.
func admit(to, from string) string {
	return fmt.Sprintf(`
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: %[1]s}
spec:
  podSelector: {matchLabels: {app: %[1]s}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: %[2]s}}}], ports: [{port: 8080}]}]
`, to, from)
}

// ready waits until Deployments ("deployment/api"), StatefulSets and pods ("pod/web") are ready.
func (p place) ready(objects ...string) {
	p.Helper()
	for _, o := range objects {
		if strings.HasPrefix(o, "pod/") {
			p.kubectl("wait", "--for=condition=Ready", o, "--timeout="+patience.String())
			continue
		}
		p.kubectl("rollout", "status", o, "--timeout="+patience.String())
	}
}

func (p place) pod(name string) *corev1.Pod {
	p.Helper()
	pod, err := p.Client.CoreV1().Pods(p.name).Get(p.Context(), name, metav1.GetOptions{})
	if err != nil {
		p.Fatal(err)
	}
	return pod
}

// pods are those with the label app that are not about to end.
func (p place) pods(app string) (list []corev1.Pod) {
	p.Helper()
	all, err := p.Client.CoreV1().Pods(p.name).List(p.Context(), metav1.ListOptions{LabelSelector: "app=" + app})
	if err != nil {
		p.Fatal(err)
	}
	for _, pod := range all.Items {
		if pod.DeletionTimestamp == nil {
			list = append(list, pod)
		}
	}
	return list
}

// direct is port 8080 of the first pod with the label app, and service the address of a Service's cluster IP.
func (p place) direct(app string) string {
	p.Helper()
	pods := p.pods(app)
	if len(pods) == 0 || pods[0].Status.PodIP == "" {
		p.Fatalf("no pod of %s has an address", app)
	}
	return pods[0].Status.PodIP + ":8080"
}

func (p place) service(name string) string {
	p.Helper()
	s, err := p.Client.CoreV1().Services(p.name).Get(p.Context(), name, metav1.GetOptions{})
	if err != nil {
		p.Fatal(err)
	}
	return s.Spec.ClusterIP + ":80"
}

// try connects from a pod once to each address.
func (p place) try(from string, addresses ...string) []traffic.Attempt {
	p.Helper()
	all, err := p.Try(p.Context(), p.name+"/"+from, addresses...)
	if err != nil {
		p.Fatal(err)
	}
	return all
}

// want tries once: what is to hold has to hold at the first attempt.
func (p place) want(why, from string, want traffic.Outcome, addresses ...string) {
	p.Helper()
	for _, a := range p.try(from, addresses...) {
		if a.Outcome != want {
			p.Errorf("%s: from %s/%s: got %+v, want %s", why, p.name, from, a, want)
		}
	}
}

// eventually tries until everything is as it is to be.
func (p place) eventually(why, from string, want traffic.Outcome, addresses ...string) {
	p.Helper()
	err := Await(p.Context(), patience, func(ctx context.Context) error {
		all, err := p.Try(ctx, p.name+"/"+from, addresses...)
		for _, a := range all {
			if a.Outcome != want {
				return fmt.Errorf("got %+v, want %s", a, want)
			}
		}
		return err
	})
	if err != nil {
		p.Errorf("%s: from %s/%s: %v", why, p.name, from, err)
	}
}

// inForce waits, as a user would, until a policy is in force everywhere.
func (p place) inForce(policy string) {
	p.Helper()
	if o, err := p.Mantlet(p.Context(), "status", "--wait", p.name+"/"+policy, "--timeout", patience.String()); err != nil {
		p.Fatalf("%v\n%s", err, o.Err)
	}
}
