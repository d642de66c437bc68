package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/mantlet/mantlet/controlplane/inject/names"
	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var testDomain = spiffeid.RequireTrustDomainFromString("td.example")

// recorded is a Target that keeps an Index as a control plane does.
type recorded struct {
	mu       sync.Mutex
	networks Networks
	index    *policy.Index
	errs     []error
	updates  int
	told     chan struct{} // holds a token after each call
}

func record(n Networks, o *policy.Objects) (*recorded, error) {
	r := &recorded{told: make(chan struct{}, 1)}
	r.fill(n.Pods, n.Services, o)
	return r, nil
}

func (r *recorded) fill(pods, services []netip.Prefix, o *policy.Objects) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.networks = Networks{pods, services}
	r.index = policy.NewIndex(policy.Config{TrustDomain: testDomain, PodNetwork: pods, ServiceNetwork: services})
	if err := r.index.ApplyAll(o); err != nil {
		r.errs = append(r.errs, err)
	}
}

func (r *recorded) Update(applied, deleted []metav1.Object) error {
	defer r.tell()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.updates++
	for _, o := range deleted {
		if _, err := r.index.Delete(o); err != nil {
			r.errs = append(r.errs, err)
		}
	}
	for _, o := range applied {
		if _, err := r.index.Apply(o); err != nil {
			r.errs = append(r.errs, err)
		}
	}
	return nil
}

func (r *recorded) Renumber(pods, services []netip.Prefix, o *policy.Objects) error {
	r.fill(pods, services, o)
	r.tell()
	return nil
}

func (r *recorded) tell() {
	select {
	case r.told <- struct{}{}:
	default:
	}
}

func (r *recorded) ranges() Networks {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.networks
}

// state is everything that it answers now.
func (r *recorded) state(services []*corev1.Service) map[string]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := state(r.index, services)
	out["networks"] = fmt.Sprint(r.networks)
	out["errors"] = fmt.Sprint(r.errs)
	return out
}

// state is everything that an Index answers, by what was asked.
func state(x *policy.Index, services []*corev1.Service) map[string]string {
	out := map[string]string{}
	for _, key := range x.SubjectKeys() {
		out["verdicts of "+key] = fmt.Sprint(x.Hashes(key))
	}
	for _, name := range x.PodNames() {
		p, _ := x.Pod(name)
		out["pod "+name] = fmt.Sprintf("%s at %s on %s, sidecar %t, packets %s", p.Subject.Key, p.Addrs, p.NodeIPs, p.Sidecar, dump(x.Packets(name)))
		for _, s := range services {
			for _, port := range s.Spec.Ports {
				var targets []netip.AddrPort
				for _, a := range x.ServiceAddrs(s.Namespace + "/" + s.Name) {
					targets = append(targets, netip.AddrPortFrom(a, uint16(port.Port)))
				}
				for _, a := range append(slices.Clone(s.Spec.ExternalIPs), ingressIPs(s)...) {
					targets = append(targets, netip.AddrPortFrom(netip.MustParseAddr(a), uint16(port.Port)))
				}
				for _, a := range p.NodeIPs {
					targets = append(targets, netip.AddrPortFrom(a, uint16(max(1, port.NodePort))))
				}
				for _, to := range targets {
					d, ok := x.DestinationFor(name, verdict.TCP, to)
					out[fmt.Sprintf("%s from %s", to, name)] = fmt.Sprint(ok, x.Admitted(name, d))
				}
			}
		}
	}
	out["problems"] = fmt.Sprint(x.Problems())
	return out
}

func ingressIPs(s *corev1.Service) (out []string) {
	for _, i := range s.Status.LoadBalancer.Ingress {
		out = append(out, i.IP)
	}
	return out
}

func dump(p *verdict.Packets) string {
	if p == nil {
		return "none"
	}
	return fmt.Sprintf("%+v", *p)
}

// everything lists objects as separate ones.
func everything(o *policy.Objects) (out []metav1.Object) {
	for _, v := range o.Nodes {
		out = append(out, v)
	}
	for _, v := range o.Namespaces {
		out = append(out, v)
	}
	for _, v := range o.NetworkPolicies {
		out = append(out, v)
	}
	for _, v := range o.Services {
		out = append(out, v)
	}
	for _, v := range o.EndpointSlices {
		out = append(out, v)
	}
	for _, v := range o.Pods {
		out = append(out, v)
	}
	return out
}

func sidecar() corev1.Container {
	always := corev1.ContainerRestartPolicyAlways
	return corev1.Container{Name: names.Container, RestartPolicy: &always, Image: "localhost/mantlet:1", Env: []corev1.EnvVar{{Name: "A", Value: "b"}}}
}

func slimOf(t *testing.T, o metav1.Object) metav1.Object {
	t.Helper()
	out, err := slim(o)
	if err != nil {
		t.Fatal(err)
	}
	return out.(metav1.Object)
}
