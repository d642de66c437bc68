package incluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

const denyAll = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny-all}
spec: {podSelector: {}, policyTypes: [Ingress]}
`

// probed is a pod that is ready when its probe says so; what asks can be told from what answers by the probe alone.
func probed(name, args, probe string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %[1]s, labels: {app: %[1]s}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: "SERVER", args: %[2]s, readinessProbe: {%[3]s, periodSeconds: 1}, livenessProbe: {%[3]s, periodSeconds: 1, failureThreshold: 60}}]
`, name, args, probe)
}

// Probes of each kind reach the app of a pod that admits nobody, and one of a port where nobody listens fails.
func TestProbes(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "probes")
	const netexec, grpc = "[netexec, --http-port=8080]", `[grpc-health-checking, --port=5000, --http-port=8080]`
	p.apply(denyAll,
		probed("http", netexec, "httpGet: {path: /healthz, port: 8080}"),
		probed("tcp", netexec, "tcpSocket: {port: 8080}"),
		probed("grpc", grpc, "grpc: {port: 5000}"),
		probed("exec", netexec, `exec: {command: [/agnhost, connect, "127.0.0.1:8080", --timeout=2s]}`),
		probed("http-closed", netexec, "httpGet: {path: /healthz, port: 8081}"),
		probed("tcp-closed", netexec, "tcpSocket: {port: 8081}"),
		probed("grpc-closed", netexec, "grpc: {port: 5000}"),
		client("stranger", ""))
	p.ready("pod/http", "pod/tcp", "pod/grpc", "pod/exec", "pod/stranger")
	p.inForce("deny-all")
	p.want("denied, whatever is probed", "stranger", traffic.Refused, p.direct("http"), p.direct("tcp"), p.direct("exec"))
	for _, name := range []string{"http-closed", "tcp-closed", "grpc-closed"} {
		if err := Await(t.Context(), patience, func(ctx context.Context) error { return unhealthy(ctx, p, name) }); err != nil {
			t.Errorf("a probe of a port where nobody listens: %s: %v", name, err)
		}
		for _, c := range p.pod(name).Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				t.Errorf("pod %s is ready: its probe is of a port where nobody listens", name)
			}
		}
	}
	for _, name := range []string{"http", "tcp", "grpc", "exec"} {
		if n := p.pod(name).Status.ContainerStatuses[0].RestartCount; n != 0 {
			t.Errorf("pod %s was restarted %d times: its liveness probe failed", name, n)
		}
	}
}

// unhealthy is nil when the kubelet has said that readiness probes of a pod are refused.
func unhealthy(ctx context.Context, p place, pod string) error {
	events, err := p.Client.CoreV1().Events(p.name).List(ctx, metav1.ListOptions{FieldSelector: "reason=Unhealthy,involvedObject.name=" + pod})
	if err != nil {
		return err
	}
	for _, e := range events.Items {
		refused := strings.Contains(e.Message, "refused") || strings.Contains(e.Message, "failed to connect") // as the gRPC probe puts it
		if refused && strings.Contains(e.Message, "Readiness") {
			return nil
		}
	}
	return errors.New("no event says that it is refused")
}

// A Job ends when its app has: the sidecar goes with it. Its init containers have the network, within policy, and so has the app.
func TestJobsAndInitContainers(t *testing.T) {
	w := smoke(t)
	t.Parallel()
	p := newPlace(t, w, "batch")
	p.apply(server("api", 1), server("other", 1), admit("api", "report"), admit("other", "nobody"))
	p.ready("deployment/api", "deployment/other")
	// The Service's endpoints come a moment after the pod is ready; a Job does not ask twice.
	p.apply(labelled("eager", "report", ""))
	p.ready("pod/eager")
	p.eventually("admitted", "eager", traffic.Reached, p.service("api"))
	p.apply(`
apiVersion: batch/v1
kind: Job
metadata: {name: report}
spec:
  backoffLimit: 0
  template:
    metadata: {labels: {app: report}}
    spec:
      restartPolicy: Never
      initContainers: [{name: before, image: "CLIENT", args: [reach, "api.batch.svc.cluster.local:80"]}]
      containers: [{name: app, image: "CLIENT", args: [reach, "api.batch.svc.cluster.local:80"]}]
`, `
apiVersion: batch/v1
kind: Job
metadata: {name: denied}
spec:
  backoffLimit: 0
  template:
    metadata: {labels: {app: report}}
    spec:
      restartPolicy: Never
      initContainers: [{name: before, image: "CLIENT", args: [reach, "other.batch.svc.cluster.local:80"]}]
      containers: [{name: app, image: "CLIENT", args: [try]}]
`)
	p.kubectl("wait", "--for=condition=Complete", "job/report", "--timeout="+patience.String())
	p.kubectl("wait", "--for=condition=Failed", "job/denied", "--timeout="+patience.String())
	logs := p.kubectl("logs", "job/denied", "-c", "before")
	if !strings.Contains(logs, string(traffic.Refused)) {
		t.Errorf("an init container that connects to whom it may not reach: %q, want it refused", logs)
	}
	var sidecar *corev1.ContainerStateTerminated
	for _, pod := range p.jobPods("report") {
		if len(pod.Status.InitContainerStatuses) == 2 {
			sidecar = pod.Status.InitContainerStatuses[0].State.Terminated
		}
	}
	if sidecar == nil || sidecar.ExitCode != 0 {
		t.Errorf("the sidecar of a Job that is complete: %+v, want it to have ended with 0", sidecar)
	}
}

func (p place) jobPods(job string) []corev1.Pod {
	p.Helper()
	list, err := p.Client.CoreV1().Pods(p.name).List(p.Context(), metav1.ListOptions{LabelSelector: "batch.kubernetes.io/job-name=" + job})
	if err != nil {
		p.Fatal(err)
	}
	return list.Items
}
