package cluster

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"text/template"

	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"

	"github.com/mantlet/mantlet/test/cluster/images"
)

// startNode makes node number i, counted from 0, and returns when it is ready for pods. Its kubelet waits for the API server.
func (c *Cluster) startNode(ctx context.Context, i int, archives []string, life Lifetime, served <-chan struct{}) error {
	name, host := fmt.Sprintf("node%d", i+1), byte(firstNode+i)
	node, err := startMachine(c.paths["node"], name, c.of(name), life)
	if err != nil {
		return err
	}
	c.add(node)
	if err := c.save(); err != nil {
		return err
	}
	network := c.state.Network
	if err := network.connectNode(c.state.Control, node, host); err != nil {
		return err
	}
	if err := makeCgroups(node.Cgroup()); err != nil {
		return err
	}
	addresses := network.addresses(host)
	if err := c.authority.client(subject{file: name, user: "system:node:" + name, group: "system:nodes", names: []string{name}, at: addresses}); err != nil {
		return err
	}
	if err := c.configure(node, addresses); err != nil {
		return err
	}
	if err := c.run(node, "containerd", "--config", c.of(name+"/containerd.toml")); err != nil {
		return err
	}
	if err := c.await(ctx, node, "containerd", func(ctx context.Context) error { return c.ctr(ctx, node, nil, "version") }); err != nil {
		return err
	}
	for _, archive := range archives {
		if err := c.importImage(ctx, node, archive); err != nil {
			return err
		}
	}
	select {
	case <-served:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	return errors.Join(
		c.run(node, "kubelet", "--config="+c.of(name+"/kubelet.yaml"), "--kubeconfig="+c.authority.path(name+".conf"), "--cert-dir=/var/lib/kubelet/pki",
			"--hostname-override="+name, "--node-ip="+commas(addresses), "--v=2"),
		c.run(node, "kube-proxy", "--config="+c.of(name+"/kube-proxy.yaml")),
		c.awaitNode(ctx, node, addresses),
	)
}

// add keeps nodes in the order of their names, in whatever order they come.
func (c *Cluster) add(node *Machine) {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := 0
	for at < len(c.state.Nodes) && (len(c.state.Nodes[at].Name) < len(node.Name) || len(c.state.Nodes[at].Name) == len(node.Name) && c.state.Nodes[at].Name < node.Name) {
		at++
	}
	c.state.Nodes = append(c.state.Nodes[:at:at], append([]*Machine{node}, c.state.Nodes[at:]...)...)
}

//go:embed node.tmpl
var nodeFiles string

// configure writes the configuration files of a node's programs, which are templates in one file: each is called as its file.
func (c *Cluster) configure(node *Machine, addresses []netip.Addr) error {
	all, err := template.New("").Parse(nodeFiles)
	if err != nil {
		return err
	}
	values := map[string]any{
		"Name": node.Name, "CgroupRoot": node.Cgroup(), "Address": addresses[0], "DNS": c.state.Network.dns(), "Pods": commas(c.state.Network.pods()),
		"Plugins": filepath.Dir(c.paths["bridge"]), "Runc": c.paths["runc"], "Pause": images.Pause, "PKI": c.authority.directory, "Directory": c.of(node.Name),
	}
	for _, file := range []string{"containerd.toml", "kubelet.yaml", "kube-proxy.yaml", "resolv.conf"} {
		var text bytes.Buffer
		if err := all.ExecuteTemplate(&text, file, values); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(c.of(node.Name), file), text.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// awaitNode waits until the node has a part of the pods' networks, connects that, and waits until the node is ready.
func (c *Cluster) awaitNode(ctx context.Context, node *Machine, addresses []netip.Addr) error {
	client, err := c.authority.httpClient(admin.file)
	if err != nil {
		return err
	}
	defer client.CloseIdleConnections()
	var object corev1.Node
	get := func(ctx context.Context) error {
		object = corev1.Node{} // what is absent from an answer would stay as it was
		return getJSON(ctx, client, c.server()+"/api/v1/nodes/"+node.Name, &object)
	}
	if err := c.await(ctx, node, "kubelet", func(ctx context.Context) error {
		if err := get(ctx); err != nil {
			return err
		}
		if len(object.Spec.PodCIDRs) < len(addresses) {
			return errors.New("it has no spec.podCIDRs yet")
		}
		return nil
	}); err != nil {
		return err
	}
	var pods []netip.Prefix
	for _, text := range object.Spec.PodCIDRs {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return fmt.Errorf("node %s: spec.podCIDRs: %w", node.Name, err)
		}
		pods = append(pods, p)
	}
	// All nodes' packets to each other's pods go through the control plane's machine, which knows all the ways.
	if err := c.state.Control.netlink(func(h *netlink.Handle) error {
		for i, p := range pods {
			if err := route(h, p, addresses[i]); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	if err := writeCNI(node, pods); err != nil {
		return err
	}
	return c.await(ctx, node, "kubelet", func(ctx context.Context) error {
		if err := get(ctx); err != nil {
			return err
		}
		for _, condition := range object.Status.Conditions {
			if condition.Type == corev1.NodeReady && condition.Status != corev1.ConditionTrue {
				return fmt.Errorf("the node is not ready: %s", condition.Message)
			}
		}
		for _, taint := range object.Spec.Taints {
			return fmt.Errorf("the node is tainted: %s", taint.Key)
		}
		return nil
	})
}

// writeCNI writes the network configuration, by which containerd knows that pods can have a network.
func writeCNI(node *Machine, pods []netip.Prefix) error {
	type object = map[string]any
	var ranges, routes []any
	for _, p := range pods {
		ranges = append(ranges, []any{object{"subnet": p.String()}})
		all := "0.0.0.0/0"
		if p.Addr().Is6() {
			all = "::/0"
		}
		routes = append(routes, object{"dst": all})
	}
	text, err := json.MarshalIndent(object{
		"cniVersion": "1.0.0", "name": "pods", "plugins": []any{
			object{"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": object{"type": "host-local", "ranges": ranges, "routes": routes}},
			object{"type": "portmap", "capabilities": object{"portMappings": true}, "snat": true, "backend": "nftables"},
		},
	}, "", "\t") // not as a program that parses and writes it would, so that tests notice what does
	if err != nil {
		return err
	}
	file := filepath.Join(node.Root(), "etc/cni/net.d/10-pods.conflist")
	if err := os.WriteFile(file+".new", append(text, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// ctr runs containerd's client on a node, in the namespace of images and containers that Kubernetes uses.
func (c *Cluster) ctr(ctx context.Context, node *Machine, stdin *os.File, args ...string) error {
	cmd := node.Command(append([]string{c.paths["ctr"], "--namespace", "k8s.io"}, args...)...)
	var complaint strings.Builder
	cmd.Stderr = &complaint
	if stdin != nil {
		cmd.Stdin = stdin
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer ended()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("ctr %s on %s: %w: %s", strings.Join(args, " "), node.Name, err, strings.TrimSpace(complaint.String()))
	}
	return nil
}

func getJSON(ctx context.Context, client *http.Client, url string, out any) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", url, response.Status)
	}
	return json.NewDecoder(response.Body).Decode(out)
}
