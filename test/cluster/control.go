package cluster

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
)

// startControlPlane starts etcd and kube-apiserver, and returns when it is ready.
func (c *Cluster) startControlPlane(ctx context.Context, o Options) error {
	network, control, loopback := c.state.Network, c.state.Control, netip.MustParseAddr("127.0.0.1")
	if err := c.run(control, "etcd", etcdFlags(c.of("etcd"), loopback)...); err != nil {
		return err
	}
	flags := apiServerFlags(apiServerSettings{
		authority: c.authority, etcd: loopback, bind: network.addresses(controlHost)[0], services: commas(network.services()), disable: o.DisableAdmission,
	})
	flags = append(flags,
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--kubelet-client-certificate="+c.authority.path("kubelet-client.crt"), "--kubelet-client-key="+c.authority.path("kubelet-client.key"),
		"--kubelet-certificate-authority="+c.authority.path("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--requestheader-client-ca-file="+c.authority.path("ca.crt"), "--requestheader-allowed-names=front-proxy",
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--proxy-client-cert-file="+c.authority.path("front-proxy.crt"), "--proxy-client-key-file="+c.authority.path("front-proxy.key"),
		"--enable-aggregator-routing=true", // webhooks are called at their pods: no service proxy runs on the control plane's machine
	)
	if err := c.run(control, "kube-apiserver", append(flags, o.APIServerFlags...)...); err != nil {
		return err
	}
	return c.awaitAPIServer(ctx)
}

func (c *Cluster) awaitAPIServer(ctx context.Context) error {
	client, err := c.authority.httpClient(admin.file)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	return c.await(ctx, c.state.Control, "kube-apiserver", func(ctx context.Context) error { return readyz(ctx, client, c.server()) })
}

// StopAPIServer ends kube-apiserver as a crash does, and leaves everything else: nobody answers at its address until StartAPIServer. In good
// order it would wait for its clients' watches, for up to a minute.
func (c *Cluster) StopAPIServer() error {
	return c.state.Control.Tasks["kube-apiserver"].kill()
}

// StartAPIServer starts kube-apiserver anew, and returns when it is ready.
func (c *Cluster) StartAPIServer(ctx context.Context) error {
	task := c.state.Control.Tasks["kube-apiserver"]
	if task.alive() {
		return errors.New("kube-apiserver runs already")
	}
	if err := c.run(c.state.Control, "kube-apiserver", task.Args[1:]...); err != nil {
		return err
	}
	return c.awaitAPIServer(ctx)
}

// startControllers starts what acts on the API server's objects.
func (c *Cluster) startControllers() error {
	network := c.state.Network
	as := func(file string) []string {
		conf := c.authority.path(file + ".conf")
		return []string{
			"--kubeconfig=" + conf, "--authentication-kubeconfig=" + conf, "--authorization-kubeconfig=" + conf, "--leader-elect=false",
			"--bind-address=127.0.0.1", "--cert-dir=" + c.of("generated-"+file), "--kube-api-qps=200", "--kube-api-burst=400",
		}
	}
	manager := append(as("controllers"),
		"--service-account-private-key-file="+c.authority.path("sa.key"), "--root-ca-file="+c.authority.path("ca.crt"), "--use-service-account-credentials=true",
		"--cluster-signing-cert-file="+c.authority.path("ca.crt"), "--cluster-signing-key-file="+c.authority.path("ca.key"),
		"--allocate-node-cidrs=true", "--cluster-cidr="+commas(network.pods()), "--service-cluster-ip-range="+commas(network.services()),
	)
	return errors.Join(
		c.run(c.state.Control, "kube-controller-manager", manager...),
		c.run(c.state.Control, "kube-scheduler", as("scheduler")...),
	)
}

// issue makes the certificates and kubeconfigs of everything but the nodes.
func (c *Cluster) issue() error {
	var err error
	if c.authority, err = newAuthority(c.of("pki"), c.server()); err != nil {
		return err
	}
	network := c.state.Network
	at := append(network.addresses(controlHost), netip.MustParseAddr("127.0.0.1"))
	for _, services := range network.services() {
		at = append(at, services.Addr().Next()) // the first one is the API server's own
	}
	names := []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
	return errors.Join(
		c.authority.issue(subject{file: "apiserver", user: "kube-apiserver", names: names, at: at}),
		c.authority.issue(subject{file: "kubelet-client", user: "kube-apiserver-kubelet-client", group: "system:masters"}),
		c.authority.issue(subject{file: "front-proxy", user: "front-proxy"}),
		c.authority.client(admin),
		c.authority.client(subject{file: "controllers", user: "system:kube-controller-manager"}),
		c.authority.client(subject{file: "scheduler", user: "system:kube-scheduler"}),
		c.authority.client(subject{file: "proxy", user: "system:kube-proxy"}),
	)
}

//go:embed coredns.yaml
var coreDNS string

// startDNS returns when DNS is ready.
func (c *Cluster) startDNS(ctx context.Context) error {
	manifest := strings.NewReplacer("CLUSTER_IP", c.state.Network.dns().String()).Replace(coreDNS)
	if _, err := c.Kubectl(ctx, manifest, "apply", "--server-side", "-f", "-"); err != nil {
		return fmt.Errorf("start DNS: %w", err)
	}
	if _, err := c.Kubectl(ctx, "", "-n", "kube-system", "rollout", "status", "deployment/coredns", "--timeout=60s"); err != nil {
		pods, _ := c.Kubectl(ctx, "", "-n", "kube-system", "describe", "pods")
		return fmt.Errorf("start DNS: %w; logs are in %s\n%s", err, filepath.Join(c.directory, "logs"), pods)
	}
	return nil
}

func commas[T fmt.Stringer](all []T) string {
	var out []string
	for _, one := range all {
		out = append(out, one.String())
	}
	return strings.Join(out, ",")
}
