package netns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// PodSpec is a pod to be made.
type PodSpec struct {
	Namespace, Name string
	IPs             []netip.Addr // at least one, of either family
	Ports           []Port       // what its probe server listens on
}

// Pod is a pod's network namespace with its probe process.
type Pod struct {
	host
	spec PodSpec

	hostsMu      sync.Mutex
	hostsWritten bool
}

// Spec is what the pod was made from.
func (p *Pod) Spec() PodSpec { return p.spec }

func (s PodSpec) check() error {
	if s.Namespace == "" || s.Name == "" {
		return errors.New("give a namespace and a name")
	}
	if len(s.IPs) == 0 {
		return errors.New("give at least one address")
	}
	for _, ip := range s.IPs {
		if !ip.IsValid() || ip.Is4In6() || ip.Zone() != "" || !ip.IsGlobalUnicast() {
			return fmt.Errorf("address %q: give a unicast IPv4 or IPv6 address", ip)
		}
	}
	type port struct {
		number   uint16
		protocol Protocol
	}
	seen := map[port]bool{}
	for _, p := range s.Ports {
		key := port{p.Number, p.Protocol.orTCP()}
		switch {
		case p.Number == 0:
			return errors.New("port 0: give a number from 1 to 65535")
		case key.protocol != TCP && key.protocol != UDP:
			return fmt.Errorf("port %d: protocol %d: only TCP and UDP", p.Number, p.Protocol)
		case seen[key]:
			return fmt.Errorf("port %d is given twice", p.Number)
		case p.Speaks != ClientFirst && p.Speaks != ServerFirst:
			return fmt.Errorf("port %d: say who speaks first (%q)", p.Number, p.Speaks)
		case key.protocol == UDP && p.Speaks != ClientFirst:
			return fmt.Errorf("port %d: a UDP server cannot speak first", p.Number)
		}
		seen[key] = true
	}
	return nil
}

// AddPod makes a pod. When it returns, the pod's probe server listens and its link carries packets.
func (n *Network) AddPod(ctx context.Context, spec PodSpec) (*Pod, error) {
	name := spec.Namespace + "/" + spec.Name
	if err := spec.check(); err != nil {
		return nil, fmt.Errorf("add pod %s: %w", name, err)
	}
	spec.IPs, spec.Ports = slices.Clone(spec.IPs), slices.Clone(spec.Ports)
	p := &Pod{host: host{network: n, name: name}, spec: spec}
	err := n.add(ctx, &p.host, spec.IPs, func() error {
		return apply(n.config.Logger, everywhere, ofApps(spec.Ports))
	}, func() error {
		return linkInner(spec.IPs)
	}, func() error {
		return linkPod(p.link, spec.IPs, n.config.Node4, n.config.Node6)
	}, spec.Ports)
	if err != nil {
		return nil, fmt.Errorf("add pod %s: %w", name, err)
	}
	return p, nil
}

// AddPods makes pods at the same time, all or none, and returns them in the order of the specs.
func (n *Network) AddPods(ctx context.Context, specs []PodSpec) ([]*Pod, error) {
	start := time.Now()
	pods := make([]*Pod, len(specs))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(4 * runtime.GOMAXPROCS(0)) // most of it is waiting for processes to start
	for i, spec := range specs {
		group.Go(func() (err error) {
			pods[i], err = n.AddPod(groupCtx, spec)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		for _, p := range pods {
			if p != nil {
				err = errors.Join(err, p.Close())
			}
		}
		return nil, err
	}
	n.config.Logger.Debug("pods are up", "pods", len(pods), "took", time.Since(start))
	return pods, nil
}

// Close takes the pod away: its processes, link and network namespace.
func (p *Pod) Close() error {
	err := p.network.remove(&p.host, p.spec.IPs)
	if rm := os.Remove(p.hostsFile()); rm != nil && !errors.Is(rm, fs.ErrNotExist) {
		err = errors.Join(err, rm)
	}
	return err
}

// add makes a host in three steps, which run in its namespace, there with the link in place, and in the node; then its probe process.
func (n *Network) add(ctx context.Context, h *host, addrs []netip.Addr, prepare, linkThere, linkHere func() error, ports []Port) error {
	link, err := n.begin(h.name, addrs)
	if err != nil {
		return err
	}
	defer n.begun.Done()
	h.link = link
	if h.ns, err = newNamespace(h.name, prepare); err != nil {
		n.forget(h.name, addrs)
		return err
	}
	err = addLink(link, h.ns)
	linked := err == nil
	if linked {
		// The far end first: what the node sends finds it ready.
		err = errors.Join(inNamespace(h.ns, linkThere), linkHere())
	}
	if err == nil {
		err = h.startApp(ctx, ports)
	}
	if err == nil {
		err = errors.Join(awaitCarrier(ctx, link, n.config.Logger),
			inNamespace(h.ns, func() error { return awaitCarrier(ctx, inner, n.config.Logger) }))
	}
	if err == nil {
		n.mu.Lock()
		n.hosts[h.name] = h
		n.mu.Unlock()
		return nil
	}
	h.end()
	if linked {
		err = errors.Join(err, removeLink(link))
	}
	err = errors.Join(err, h.ns.Close())
	n.forget(h.name, addrs)
	return err
}
