package cluster

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/test/cluster/images"
)

const pods = `
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 0
  containers:
  - name: main
    image: registry.k8s.io/e2e-test-images/agnhost:2.63.0
---
apiVersion: v1
kind: Pod
metadata: {name: server, labels: {app: server}}
spec:
  nodeName: node2
  terminationGracePeriodSeconds: 0
  securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: main
    image: localhost/loaded:1
    args: [netexec, --http-port=8080]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: server}
spec: {selector: {app: server}, ipFamilyPolicy: RequireDualStack, ports: [{port: 80, targetPort: 8080}]}
`

// Two nodes with both families: an image from an archive, pods on both that reach each other by address, by cluster IP and by name, an API server
// that goes and comes, and nothing left of it all.
func TestCluster(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("makes a whole cluster, as root; left out because of -short")
	}
	directory := filepath.Join(t.TempDir(), "cluster")
	began := time.Now()
	c, err := Up(t.Context(), Options{Directory: directory, Nodes: 2, Family: DualStack, Life: WithProcess, Log: testLog(t)})
	if err != nil {
		t.Fatalf("%v\n(go test -short leaves out what needs root)", err)
	}
	t.Logf("up after %.1f s", time.Since(began).Seconds())
	t.Cleanup(func() {
		if err := c.Down(); err != nil {
			t.Error(err)
		}
	})
	archive := filepath.Join(t.TempDir(), "loaded.tar")
	image := images.Image{Name: "localhost/loaded:1", Files: map[string]string{"/agnhost": c.paths["agnhost"]}, Entrypoint: []string{"/agnhost"}}
	if err := image.Write(archive); err != nil {
		t.Fatal(err)
	}
	if err := c.LoadImage(t.Context(), archive); err != nil {
		t.Fatal(err)
	}
	kubectl(t, c, pods, "apply", "-f", "-")
	kubectl(t, c, "", "wait", "--for=condition=Ready", "pod/client", "pod/server", "--timeout=60s")
	server := getPod(t, c, "server")
	testConnections(t, c, server)
	testAPIServerRestart(t, c, server)
	testPodSecurity(t, c)
	testDown(t, c)
}

func testConnections(t *testing.T, c *Cluster, server corev1.Pod) {
	var addresses []string
	for _, ip := range server.Status.PodIPs {
		addresses = append(addresses, net.JoinHostPort(ip.IP, "8080"))
	}
	for _, ip := range strings.Fields(kubectl(t, c, "", "get", "service", "server", "-o", `jsonpath={.spec.clusterIPs[0]} {.spec.clusterIPs[1]}`)) {
		addresses = append(addresses, net.JoinHostPort(ip, "80"))
	}
	if len(addresses) != 4 {
		t.Errorf("addresses of the server and its service: %q, want two of each", addresses)
	}
	addresses = append(addresses, "server.default.svc.cluster.local:80", "kubernetes.default:443")
	connect := func(address string) error {
		_, err := c.Kubectl(t.Context(), "", "exec", "client", "--", "/agnhost", "connect", address, "--timeout=2s")
		return err
	}
	for _, address := range addresses {
		// The service proxies may hear of an endpoint a moment after the pod is ready.
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if err := await(ctx, nil, func(context.Context) error { return connect(address) }); err != nil {
			t.Errorf("client to %s: %v", address, err)
		}
		cancel()
	}
	if err := connect(net.JoinHostPort(server.Status.PodIP, "8081")); err == nil || !strings.Contains(err.Error(), "REFUSED") {
		t.Errorf("a port where nobody listens: got %v, want REFUSED", err)
	}
}

// testAPIServerRestart: pods run on while there is no API server, and are the same when there is one again.
func testAPIServerRestart(t *testing.T, c *Cluster, server corev1.Pod) {
	if err := c.StopAPIServer(); err != nil {
		t.Fatal(err)
	}
	if out, err := c.Kubectl(t.Context(), "", "get", "nodes", "--request-timeout=2s"); err == nil {
		t.Errorf("the API server is stopped, and answers: %s", out)
	}
	// This machine is a neighbour of the nodes.
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("http://%s:8080/hostname", server.Status.PodIP), nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	if response, err := client.Do(request); err != nil {
		t.Error(err)
	} else {
		response.Body.Close()
	}
	if err := c.StartAPIServer(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := getPod(t, c, "server")
	if again.UID != server.UID || again.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("after the restart: pod %s with %d restarts, before: %s", again.UID, again.Status.ContainerStatuses[0].RestartCount, server.UID)
	}
	kubectl(t, c, "", "delete", "pod", "client", "--timeout=30s") // needs kubelet and API server to have found each other again
}

// testPodSecurity: the admission plugin is on, unless it is switched off.
func testPodSecurity(t *testing.T, c *Cluster) {
	kubectl(t, c, "", "label", "namespace", "default", "pod-security.kubernetes.io/enforce=baseline")
	pod := strings.Replace(strings.Split(pods, "---")[0], "spec:", "spec:\n  hostNetwork: true", 1)
	if _, err := c.Kubectl(t.Context(), pod, "apply", "-f", "-"); err == nil || !strings.Contains(err.Error(), "violates PodSecurity") {
		t.Errorf("a pod in the host's network at Pod Security baseline: got %v", err)
	}
}

// testDown: nothing of the cluster is left, whatever else goes on on this machine.
func testDown(t *testing.T, c *Cluster) {
	machines := append([]*Machine{c.state.Control}, c.state.Nodes...)
	link, err := netlink.LinkByName(c.state.Network.link())
	if err != nil {
		t.Fatal(err)
	}
	namespaces := map[string]bool{} // of processes
	for _, m := range machines {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", m.Init.PID))
		if err != nil {
			t.Fatal(err)
		}
		namespaces[ns] = true
	}
	if n := len(processesIn(t, namespaces)); n < 15 {
		t.Errorf("%d processes in the cluster's namespaces: too few to be all", n)
	}
	began := time.Now()
	if err := c.Down(); err != nil {
		t.Fatal(err)
	}
	t.Logf("down after %.1f s", time.Since(began).Seconds())
	if left := processesIn(t, namespaces); len(left) > 0 {
		t.Errorf("processes left: %q", left)
	}
	if l, err := netlink.LinkByIndex(link.Attrs().Index); err == nil {
		t.Errorf("link left: %s", l.Attrs().Name)
	}
	hierarchies, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range hierarchies {
		for _, m := range machines {
			if exists(filepath.Join(h, m.Cgroup())) {
				t.Errorf("cgroup left: %s", filepath.Join(h, m.Cgroup()))
			}
		}
	}
	// Of every thread: one that had entered a machine would keep its mounts.
	all, err := filepath.Glob("/proc/self/task/*/mountinfo")
	if err != nil || len(all) == 0 {
		t.Fatal(all, err)
	}
	for _, file := range all {
		mounts, err := os.ReadFile(file)
		if err != nil {
			continue // the thread has ended
		}
		for line := range strings.Lines(string(mounts)) {
			if strings.Contains(line, c.directory) {
				t.Errorf("mount left: %s: %s", file, line)
			}
		}
	}
	if exists(c.directory) {
		t.Errorf("directory left: %s", c.directory)
	}
}

func processesIn(t *testing.T, namespaces map[string]bool) (out []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range all {
		if ns, err := os.Readlink(file); err == nil && namespaces[ns] {
			name, _ := os.ReadFile(strings.TrimSuffix(file, "ns/pid") + "comm")
			out = append(out, strings.TrimSpace(string(name)))
		}
	}
	return out
}

func kubectl(t *testing.T, c *Cluster, stdin string, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), stdin, args...)
	if err != nil {
		described, _ := c.Kubectl(context.WithoutCancel(t.Context()), "", "describe", "pods")
		t.Fatalf("%v\n%s", err, described)
	}
	return out
}

func getPod(t *testing.T, c *Cluster, name string) (out corev1.Pod) {
	t.Helper()
	client, err := c.authority.httpClient(admin.file)
	if err != nil {
		t.Fatal(err)
	}
	defer client.CloseIdleConnections()
	if err := getJSON(t.Context(), client, c.server()+"/api/v1/namespaces/default/pods/"+name, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// What cannot work is refused before anything is made, and all of it at once.
func TestOptionsAreChecked(t *testing.T) {
	used := t.TempDir()
	if err := os.WriteFile(filepath.Join(used, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		options Options
		want    string
	}{
		{Options{Directory: used}, used + " has something in it"},
		{Options{Directory: "/run/cluster"}, "nodes have their own /run"},
		{Options{Directory: "/var/lib/a/b"}, "nodes have their own /var/lib"},
		{Options{Directory: filepath.Join(used, "new"), Nodes: 201}, "201, where 1 to 200"},
	} {
		if err := c.options.check(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v:\ngot  %v\nwant %s", c.options, err, c.want)
		}
	}
}

func TestNetworks(t *testing.T) {
	n := network{Number: 3, Family: DualStack}
	for _, c := range []struct{ what, got, want string }{
		{"nodes", commas(n.nodes()), "172.30.3.0/24,fd6d:616e:7403::/64"},
		{"pods", commas(n.pods()), "10.203.0.0/16,fd6d:616e:7403:100::/56"},
		{"services", commas(n.services()), "10.96.0.0/16,fd6d:616e:7403:ff00::/112"},
		{"first node", commas(n.addresses(firstNode)), "172.30.3.11,fd6d:616e:7403::b"},
		{"DNS", n.dns().String(), "10.96.0.10"},
		{"IPv4 only", commas(network{Number: 3}.pods()), "10.203.0.0/16"},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %s, want %s", c.what, c.got, c.want)
		}
	}
	for _, c := range []struct {
		route string
		want  bool
	}{
		{"0.0.0.0/0", false}, {"10.0.0.0/8", true}, {"10.203.7.0/24", true}, {"10.204.0.0/16", false}, {"172.30.3.128/25", true}, {"fd6d:616e:7403::/48", true},
		{"fe80::/64", false},
	} {
		if got := n.overlaps([]netlink.Route{{Dst: ipNet(netip.MustParsePrefix(c.route))}}); got != c.want {
			t.Errorf("a route to %s: overlaps: %v, want %v", c.route, got, c.want)
		}
	}
}
