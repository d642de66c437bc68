package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// clusterDomain ends the full names of Services, as in most clusters.
const clusterDomain = "cluster.local"

// Exec runs a program in a pod ("namespace/name", or the name alone where only one pod has it), in which the names of pods and
// Services resolve.
func (s *Sandbox) Exec(ctx context.Context, name string, session netns.Session) (*netns.Process, error) {
	p, err := s.find(name)
	if err != nil {
		return nil, err
	}
	return p.net.Exec(ctx, session)
}

func (s *Sandbox) find(name string) (*pod, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if p := s.pods[name]; p != nil && p.net != nil {
		return p, nil
	}
	var list []string
	for full, p := range s.pods {
		if _, short, _ := strings.Cut(full, "/"); short == name && p.net != nil {
			list = append(list, full)
		}
	}
	slices.Sort(list)
	switch len(list) {
	case 1:
		return s.pods[list[0]], nil
	case 0:
		return nil, fmt.Errorf("there is no pod %q\n  hint: the pods are %s", name, strings.Join(slices.Sorted(maps.Keys(s.pods)), ", "))
	}
	return nil, fmt.Errorf("%d pods are called %q\n  hint: say which: %s", len(list), name, strings.Join(list, ", "))
}

// nameHosts gives every pod the names of all others, and of the Services.
func (s *Sandbox) nameHosts() error {
	names := namesOf(&s.cfg.Manifests.Objects, s.index)
	var errs []error
	for _, p := range s.pods {
		errs = append(errs, p.net.SetHosts(names.hosts(p.spec)))
	}
	return errors.Join(errs...)
}

// names is what resolves in the cluster: namespace → short name → addresses, and a form for names outside.
type names struct {
	services, pods []named
	external       []string // words on what does not resolve
}

// named is something with a name. Within its own namespace the bare name will do.
type named struct {
	namespace, name string
	forms           []string // that hold in every namespace
	addrs           []netip.Addr
}

// namesOf collects names as a cluster's DNS has them (DNS-Based Service Discovery of Kubernetes, version 1.1.0): Services, their
// endpoints with a host name, pods by their addresses with dashes; and beyond that pods by their own names.
func namesOf(o *policy.Objects, index *policy.Index) *names {
	n := &names{}
	for _, svc := range o.Services {
		full := svc.Name + "." + svc.Namespace + ".svc"
		if svc.Spec.Type == corev1.ServiceTypeExternalName {
			n.external = append(n.external, full+" is "+svc.Spec.ExternalName+", outside the sandbox")
			continue
		}
		addrs := index.ServiceAddrs(svc.Namespace + "/" + svc.Name)
		if svc.Spec.ClusterIP == corev1.ClusterIPNone {
			addrs = n.headless(svc, o.EndpointSlices)
		}
		n.services = append(n.services, named{svc.Namespace, svc.Name, []string{svc.Name + "." + svc.Namespace, full, full + "." + clusterDomain}, addrs})
	}
	for _, p := range o.Pods {
		at := "." + p.Namespace + ".pod"
		forms := []string{p.Name + "." + p.Namespace, p.Name + at, p.Name + at + "." + clusterDomain}
		addrs := matrix.PodAddrs(p)
		n.pods = append(n.pods, named{p.Namespace, p.Name, forms, addrs})
		for _, a := range addrs {
			dashed := strings.NewReplacer(".", "-", ":", "-").Replace(a.String()) + at
			n.services = append(n.services, named{forms: []string{dashed, dashed + "." + clusterDomain}, addrs: []netip.Addr{a}})
		}
	}
	return n
}

// headless returns the addresses of a Service without a cluster IP, and notes those of its endpoints that have names of their own.
func (n *names) headless(svc *corev1.Service, endpointSlices []*discoveryv1.EndpointSlice) (addrs []netip.Addr) {
	for _, slice := range endpointSlices {
		if slice.Namespace != svc.Namespace || slice.Labels[discoveryv1.LabelServiceName] != svc.Name {
			continue
		}
		for _, e := range slice.Endpoints {
			if e.Conditions.Ready != nil && !*e.Conditions.Ready {
				continue
			}
			var own []netip.Addr
			for _, text := range e.Addresses {
				if a, err := netip.ParseAddr(text); err == nil {
					own = append(own, a)
				}
			}
			addrs = append(addrs, own...)
			if e.Hostname != nil && *e.Hostname != "" {
				at := *e.Hostname + "." + svc.Name
				full := at + "." + svc.Namespace + ".svc"
				n.services = append(n.services, named{svc.Namespace, at, []string{at + "." + svc.Namespace, full, full + "." + clusterDomain}, own})
			}
		}
	}
	return addrs
}

// hosts writes the names as hosts(5) for a pod. Where a pod and a Service have the same name it is the Service's.
func (n *names) hosts(p *corev1.Pod) []byte {
	at := map[netip.Addr][]string{}
	var order []netip.Addr
	taken := map[string]bool{}
	add := func(list []named) {
		for _, e := range list {
			names := e.forms
			if e.namespace == p.Namespace {
				names = append([]string{e.name}, names...)
			}
			names = slices.DeleteFunc(slices.Clone(names), func(name string) bool { return taken[name] })
			for _, a := range e.addrs {
				if len(at[a]) == 0 && len(names) > 0 {
					order = append(order, a)
				}
				at[a] = append(at[a], names...)
			}
			for _, name := range names {
				taken[name] = true
			}
		}
	}
	add([]named{{namespace: p.Namespace, name: p.Name, addrs: matrix.PodAddrs(p)}}) // its own name is its own, as in every container
	add(n.services)
	add(n.pods)
	slices.SortFunc(order, netip.Addr.Compare)
	var b bytes.Buffer
	b.WriteString("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n")
	for _, a := range order {
		// One name a line: some resolvers stop reading a long one.
		for _, name := range at[a] {
			fmt.Fprintf(&b, "%s %s\n", a, name)
		}
	}
	for _, text := range n.external {
		fmt.Fprintf(&b, "# %s\n", text)
	}
	return b.Bytes()
}
