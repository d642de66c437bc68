package replica

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/mantlet/mantlet/agent"
	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/test/cluster"
	"github.com/mantlet/mantlet/test/cluster/apitest"
)

const (
	agentsAt = "10.64.0.1:15012"
	healthAt = "127.0.0.1:15014"
	// The ports of a second replica: in a cluster each has an address of its own.
	secondAt       = "10.64.0.1:15112"
	secondHealthAt = "127.0.0.1:15114"

	port = 8080
)

// world is an API server on the node, and pods in namespaces of their own, of which the API server hears from the test.
type world struct {
	t       testing.TB
	dir     string
	server  *cluster.APIServer
	client  kubernetes.Interface
	network *netns.Network
}

// build builds a program, once: with the race detector, or, to be measured, as it is shipped.
func build(t testing.TB, name string) string {
	t.Helper()
	building.Lock()
	defer building.Unlock()
	enclosure, err := netns.Enclosed()
	if err != nil {
		t.Fatal(err)
	}
	flag := "-race"
	if _, measured := t.(*testing.B); measured {
		flag = "-trimpath"
	}
	path := filepath.Join(enclosure.RunDir, name+flag)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	cmd := exec.Command("go", "build", flag, "-o", path, "./cmd/"+name)
	cmd.Dir = filepath.Join("..", "..")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, out)
	}
	return path
}

var building sync.Mutex

func newWorld(t testing.TB) *world {
	t.Helper()
	enclosure, err := netns.Enclosed()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t}
	if w.dir, err = os.MkdirTemp(enclosure.RunDir, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(w.dir, 0o755); err != nil { // Envoy runs as another user
		t.Fatal(err)
	}
	if w.network, err = netns.New(netns.Config{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.network.Close(); err != nil {
			t.Error(err)
		}
	})
	w.server = apitest.Start(t, cluster.APIServerOptions{})
	w.client = apitest.Client(t, w.server)
	ctx := t.Context()
	for _, name := range []string{"shop", names.SystemNamespace} {
		_, err := w.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		w.must(err)
	}
	_, err = w.client.CoreV1().ServiceAccounts("shop").Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{})
	w.must(err)
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.64.0.0/24"}}}
	node, err = w.client.CoreV1().Nodes().Create(ctx, node, metav1.CreateOptions{})
	w.must(err)
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}
	_, err = w.client.CoreV1().Nodes().UpdateStatus(ctx, node, metav1.UpdateOptions{})
	w.must(err)
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// controlPlane is a running `mantlet control-plane`.
type controlPlane struct {
	t       testing.TB
	cmd     *exec.Cmd
	log     *text
	ended   chan struct{}
	err     error // valid after ended
	stopped bool
	health  string
}

// launch starts the process, which ends at once when it is asked to unless flags say otherwise, and waits until its health port answers.
func (w *world) launch(agents, health string, flags ...string) *controlPlane {
	w.t.Helper()
	p := &controlPlane{t: w.t, log: &text{}, ended: make(chan struct{}), health: health}
	p.cmd = exec.Command(build(w.t, "mantlet"), append([]string{"control-plane", "--kubeconfig", w.server.Kubeconfig(), "--listen", agents, "--health", health, "--status", statusOf(health),
		"--trust-domain", "td.example", "--grace", "0s"}, flags...)...)
	p.cmd.Stderr = p.log
	w.must(p.cmd.Start())
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	w.t.Cleanup(func() {
		if !p.stopped {
			_ = p.cmd.Process.Kill()
			<-p.ended
		}
		if w.t.Failed() {
			w.t.Logf("control plane:\n%s", p.log)
		}
	})
	if !until(w.t.Context(), func() bool { code, _ := p.get("/healthz"); return code == http.StatusOK }) {
		w.t.Fatal("the control plane is not alive")
	}
	return p
}

func (w *world) startControlPlane() *controlPlane {
	w.t.Helper()
	p := w.launch(agentsAt, healthAt)
	w.ready(p)
	return p
}

func (w *world) ready(p *controlPlane) {
	w.t.Helper()
	if !until(w.t.Context(), func() bool { code, _ := p.get("/readyz"); return code == http.StatusOK }) {
		w.t.Fatalf("the control plane is not ready:\n%s", p.log)
	}
}

// stop asks the process to end, which it has to do in an orderly way.
func (p *controlPlane) stop() {
	p.t.Helper()
	p.stopped = true
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-p.ended:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.ended
		p.t.Fatal("the control plane does not end")
	}
	if p.err != nil {
		p.t.Errorf("the control plane ended with %v", p.err)
	}
}

// get asks the health port; 0: nobody answers.
func (p *controlPlane) get(path string) (code int, body string) {
	r, err := http.Get("http://" + p.health + path)
	if err != nil {
		return 0, ""
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return 0, ""
	}
	return r.StatusCode, string(b)
}

// acks is how many responses of a type sidecars have confirmed.
func (p *controlPlane) acks(of string) int {
	p.t.Helper()
	_, text := p.get("/metrics")
	_, rest, _ := strings.Cut(text, `mantlet_xds_acks_total{type="`+of+`"} `)
	line, _, _ := strings.Cut(rest, "\n")
	n, err := strconv.Atoi(line)
	if err != nil {
		p.t.Fatalf("acks of %s: %v\n%s", of, err, text)
	}
	return n
}

// sidecarPod is a pod with an agent.
type sidecarPod struct {
	object *corev1.Pod
	net    *netns.Pod
	addr   netip.Addr
	runDir string
}

// createPod makes a pod that has a sidecar, and runs, for all that the API says.
func (w *world) createPod(name, ip string) *corev1.Pod {
	w.t.Helper()
	always := corev1.ContainerRestartPolicyAlways
	p, err := w.client.CoreV1().Pods("shop").Create(w.t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{NodeName: "node", ServiceAccountName: "default",
			InitContainers: []corev1.Container{{Name: names.Container, Image: "localhost/mantlet:1", RestartPolicy: &always}},
			Containers:     []corev1.Container{{Name: "app", Image: "localhost/app:1"}}},
	}, metav1.CreateOptions{})
	w.must(err)
	p.Status.Phase, p.Status.PodIP, p.Status.PodIPs = corev1.PodRunning, ip, []corev1.PodIP{{IP: ip}}
	p.Status.HostIP, p.Status.HostIPs = "192.0.2.1", []corev1.HostIP{{IP: "192.0.2.1"}}
	p, err = w.client.CoreV1().Pods("shop").UpdateStatus(w.t.Context(), p, metav1.UpdateOptions{})
	w.must(err)
	return p
}

// addPod makes a pod and its network, as the kubelet would.
func (w *world) addPod(name, ip string) *sidecarPod {
	w.t.Helper()
	var err error
	s := &sidecarPod{object: w.createPod(name, ip), addr: netip.MustParseAddr(ip)}
	s.net, err = w.network.AddPod(w.t.Context(), netns.PodSpec{Namespace: "shop", Name: name, IPs: []netip.Addr{s.addr},
		Ports: []netns.Port{{Number: port, Speaks: netns.ServerFirst}}})
	w.must(err)
	return s
}

// startAgents starts agents with what injection gives them: the trust bundle of their namespace, and a token of their pod.
func (w *world) startAgents(controlPlane string, pods ...*sidecarPod) {
	w.t.Helper()
	w.startAgentsWith(nil, controlPlane, pods...)
}

// startAgentsWith does so with more flags.
func (w *world) startAgentsWith(flags []string, controlPlane string, pods ...*sidecarPod) {
	w.t.Helper()
	bundle := w.bundle()
	for _, p := range pods {
		dir := filepath.Join(w.dir, p.object.Name)
		w.must(os.MkdirAll(dir, 0o755))
		w.must(os.WriteFile(filepath.Join(dir, "token"), []byte(w.token(p, names.TokenAudience)), 0o600))
		w.must(os.WriteFile(filepath.Join(dir, "ca.crt"), []byte(bundle), 0o644))
		p.runDir = filepath.Join(dir, "run")
		exempt := "uid"
		if w.network.Enclosure().SingleUID {
			exempt = "mark"
		}
		log := &text{}
		process, err := p.net.Start(w.t.Context(), netns.Command{
			Path: build(w.t, "mantlet-agent"), User: netns.Root, Stdout: log, Stderr: log,
			Args: append([]string{"run", "--control-plane", controlPlane, "--trust-domain", "td.example", "--bundle", filepath.Join(dir, "ca.crt"),
				"--token-file", filepath.Join(dir, "token"), "--envoy", w.envoy(), "--run-dir", p.runDir, "--exempt", exempt, "--drain-timeout", "1s"}, flags...),
			Env: []string{"PATH=/usr/bin:/bin", "POD_NAMESPACE=shop", "POD_NAME=" + p.object.Name},
		})
		w.must(err)
		w.t.Cleanup(func() {
			process.Kill()
			_ = process.Wait() // was killed
			if w.t.Failed() {
				w.t.Logf("agent of %s:\n%s", p.object.Name, log)
			}
		})
	}
	for _, p := range pods {
		if !until(w.t.Context(), func() bool { return agent.Ready(w.t.Context(), p.runDir, 0) == nil }) {
			w.t.Fatalf("the sidecar of %s is not ready: %v", p.object.Name, agent.Ready(w.t.Context(), p.runDir, 0))
		}
	}
}

func (w *world) envoy() string {
	w.t.Helper()
	path := os.Getenv("MANTLET_ENVOY")
	if path == "" {
		path = filepath.Join("..", "..", ".cache", "envoy", "envoy")
	}
	path, err := filepath.Abs(path)
	w.must(err)
	if _, err := os.Stat(path); err != nil {
		w.t.Fatalf("no Envoy: %v\nrun: make envoy", err)
	}
	return path
}

// try connects from one pod to another, and tells what connect() says; an answer must come where it says yes.
func (w *world) try(from, to *sidecarPod) string {
	w.t.Helper()
	outcomes, err := from.net.Probe(w.t.Context(), []netns.Target{{Addr: netip.AddrPortFrom(to.addr, port), Speaks: netns.ServerFirst}})
	w.must(err)
	if o := outcomes[0]; o.Connect != netns.Connected || o.Err == "" {
		return o.Connect
	}
	return outcomes[0].Connect + ", then " + outcomes[0].Err
}

func (w *world) want(when string, from, to *sidecarPod, want string) {
	w.t.Helper()
	if got := w.try(from, to); got != want {
		w.t.Errorf("%s: %s → %s: %s, want %s", when, from.object.Name, to.object.Name, got, want)
	}
}

func (w *world) await(what string, from, to *sidecarPod, want string) {
	w.t.Helper()
	if !until(w.t.Context(), func() bool { return w.try(from, to) == want }) {
		w.t.Fatalf("%s: %s → %s is not %s but %s", what, from.object.Name, to.object.Name, want, w.try(from, to))
	}
}

// admit is a policy that admits pods of one app only to another.
func admit(to, from string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: to},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": to}},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{
				{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": from}}}}}},
		},
	}
}

func (w *world) apply(p *networkingv1.NetworkPolicy) {
	w.t.Helper()
	api := w.client.NetworkingV1().NetworkPolicies(p.Namespace)
	_, err := api.Create(w.t.Context(), p, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = api.Update(w.t.Context(), p, metav1.UpdateOptions{})
	}
	w.must(err)
}

func (w *world) deletePolicy(name string) {
	w.t.Helper()
	w.must(w.client.NetworkingV1().NetworkPolicies("shop").Delete(w.t.Context(), name, metav1.DeleteOptions{}))
}

func (w *world) relabel(p *sidecarPod, app string) {
	w.t.Helper()
	is, err := w.client.CoreV1().Pods("shop").Get(w.t.Context(), p.object.Name, metav1.GetOptions{})
	w.must(err)
	is.Labels["app"] = app
	_, err = w.client.CoreV1().Pods("shop").Update(w.t.Context(), is, metav1.UpdateOptions{})
	w.must(err)
}

// text is what a process says.
type text struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *text) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *text) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Sprint(l.buf.String())
}
