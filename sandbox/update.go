package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
	"github.com/mantlet/mantlet/xds/server"
)

// Change is what an Update did.
type Change struct {
	Objects []string  // "NetworkPolicy shop/db changed", sorted
	Began   time.Time // when the objects were handed to the control plane
	// Sidecars were pushed something; all of them had confirmed it InForce after Began.
	Sidecars []string
	InForce  time.Duration
	Bytes    uint64 // sent to them
	// Types of the resources that were sent, sorted: "Cluster" for endpoints, the others ("Listener",
	// "TypedExtensionConfig", "Verdicts") for policy.
	Types []string
}

// ErrOtherNetworks is what Update refuses: the networks of pods and Services are those that the sandbox was started with.
var ErrOtherNetworks = errors.New("the manifests give addresses outside the networks that the sandbox runs with\n  hint: start the sandbox anew")

// Update makes the running sandbox one of other manifests, read with the present ones as source.Options.Previous. Pods that are new
// are started, those that are gone are ended; a pod whose addresses, ports or injection change is replaced, and so is one of a workload
// whose labels change, as a Deployment would do it. A pod that stands alone is relabelled while it runs. It returns when every sidecar
// has confirmed what it was sent; while the control plane is stopped, at once. After ErrOtherNetworks all is as before, after other errors not.
func (s *Sandbox) Update(ctx context.Context, next *source.Manifests) (*Change, error) {
	if !slices.Equal(next.PodNetwork, s.cfg.Manifests.PodNetwork) || !slices.Equal(next.ServiceNetwork, s.cfg.Manifests.ServiceNetwork) {
		return nil, ErrOtherNetworks
	}
	d := diff(&s.cfg.Manifests.Objects, &next.Objects)
	c := &Change{Objects: d.words}
	if len(d.words) == 0 {
		return c, nil
	}
	if s.cp == nil {
		return c, s.updateUnserved(ctx, next, d)
	}
	index := policy.NewIndex(s.cfg.Policy)
	if err := index.ApplyAll(&next.Objects); err != nil {
		return nil, err
	}
	before := s.cp.Server().Ledger().Totals()
	c.Began = time.Now()
	// First what is there already: the change is in force when these have confirmed it, whatever starting new pods takes.
	if err := s.cp.Update(s.withUIDs(d), d.deleted); err != nil {
		return nil, err
	}
	s.cfg.Manifests, s.index = next, index
	if err := s.dropPods(d.gone); err != nil {
		return nil, err
	}
	if err := s.relabel(ctx, d.relabelled); err != nil {
		return nil, err
	}
	if err := s.confirmed(ctx); err != nil {
		return nil, err
	}
	c.measure(s.cp.Server().Ledger(), before)
	if !d.policyOnly() {
		if err := s.lead(ctx); err != nil {
			return nil, err
		}
		if err := s.makePods(ctx, d.fresh); err != nil {
			return nil, err
		}
		if err := s.nameHosts(); err != nil {
			return nil, err
		}
	}
	return c, s.startAgents(ctx)
}

// withUIDs is what is applied, pods with the UIDs under which their agents are attested: a pod that stays keeps its own.
func (s *Sandbox) withUIDs(d *difference) []metav1.Object {
	out := slices.Clone(d.applied)
	for i, o := range out {
		p, ok := o.(*corev1.Pod)
		if !ok {
			continue
		}
		q := s.withUID(p)
		if is := s.pods[p.Namespace+"/"+p.Name]; is != nil && !slices.Contains(d.fresh, p) {
			q.UID = types.UID(is.uid)
		}
		out[i] = q
	}
	return out
}

// confirmed waits until every sidecar has ACKed everything that was published for it.
func (s *Sandbox) confirmed(ctx context.Context) error {
	for _, name := range slices.Sorted(maps.Keys(s.pods)) {
		if s.pods[name].agent == nil {
			continue
		}
		if err := s.cp.Server().Ledger().Wait(ctx, server.Client(name)); err != nil {
			return fmt.Errorf("sidecar of %s: %w", name, err)
		}
	}
	return nil
}

// measure reads from the ledger who was sent something since the change began, and when the last of it was confirmed.
func (c *Change) measure(l *server.Ledger, before map[string]server.Counters) {
	for typeURL, n := range l.Totals() {
		if more := n.Bytes - before[typeURL].Bytes; more > 0 {
			c.Bytes += more
			c.Types = append(c.Types, typeURL[strings.LastIndexByte(typeURL, '.')+1:])
		}
	}
	slices.Sort(c.Types)
	for _, st := range l.Snapshot() {
		pushed := false
		for _, r := range st.Resources {
			if r.SentAt.Before(c.Began) {
				continue
			}
			pushed = true
			c.InForce = max(c.InForce, r.AckedAt.Sub(c.Began))
		}
		if pushed {
			c.Sidecars = append(c.Sidecars, string(st.Client))
		}
	}
	slices.Sort(c.Sidecars)
}

func (s *Sandbox) dropPods(names []string) error {
	var g errgroup.Group
	for _, name := range names {
		p := s.pods[name]
		s.mu.Lock()
		delete(s.pods, name)
		s.mu.Unlock()
		s.minter.Revoke(p.uid)
		g.Go(func() error {
			if p.agent != nil {
				if err := p.agent.stop(); err != nil {
					return err
				}
			}
			return p.net.Close()
		})
	}
	return g.Wait()
}

// policyOnly reports whether pods, Services and names are as they were.
func (d *difference) policyOnly() bool {
	return !slices.ContainsFunc(slices.Concat(d.applied, d.deleted), func(o metav1.Object) bool {
		_, ok := o.(*networkingv1.NetworkPolicy)
		return !ok
	})
}

// difference is what it takes to get from one set of objects to another.
type difference struct {
	words            []string
	applied, deleted []metav1.Object
	gone             []string // pods to end: those that are gone, and those that are replaced
	fresh            []*corev1.Pod
	relabelled       []*corev1.Pod // running ones
}

func diff(old, next *policy.Objects) *difference {
	d := &difference{}
	compareObjects(d, "Node", old.Nodes, next.Nodes)
	compareObjects(d, "Namespace", old.Namespaces, next.Namespaces)
	compareObjects(d, "NetworkPolicy", old.NetworkPolicies, next.NetworkPolicies)
	compareObjects(d, "Service", old.Services, next.Services)
	compareObjects(d, "EndpointSlice", old.EndpointSlices, next.EndpointSlices)
	compareObjects(d, "Pod", old.Pods, next.Pods)
	was, is := byName(old.Pods), byName(next.Pods)
	for name, p := range is {
		before, ok := was[name]
		if ok && !replaced(before, p) {
			if !maps.Equal(before.Labels, p.Labels) {
				d.relabelled = append(d.relabelled, p)
			}
			continue
		}
		d.fresh = append(d.fresh, p)
		if ok {
			d.gone = append(d.gone, name)
		}
	}
	for name := range was {
		if _, ok := is[name]; !ok {
			d.gone = append(d.gone, name)
		}
	}
	slices.Sort(d.gone)
	slices.SortFunc(d.fresh, func(a, b *corev1.Pod) int { return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name) })
	slices.Sort(d.words)
	return d
}

func compareObjects[T metav1.Object](d *difference, kind string, old, next []T) {
	was, is := byName(old), byName(next)
	for _, name := range slices.Sorted(maps.Keys(is)) {
		o := is[name]
		before, ok := was[name]
		switch {
		case !ok:
			d.words = append(d.words, kind+" "+name+" is new")
		case !equality.Semantic.DeepEqual(before, o):
			d.words = append(d.words, kind+" "+name+" changed")
		default:
			continue
		}
		d.applied = append(d.applied, o)
	}
	for _, name := range slices.Sorted(maps.Keys(was)) {
		if _, ok := is[name]; !ok {
			d.words = append(d.words, kind+" "+name+" is gone")
			d.deleted = append(d.deleted, was[name])
		}
	}
}

func byName[T metav1.Object](list []T) map[string]T {
	out := make(map[string]T, len(list))
	for _, o := range list {
		name := o.GetName()
		if ns := o.GetNamespace(); ns != "" {
			name = ns + "/" + name
		}
		out[name] = o
	}
	return out
}

// relabel waits until pods whose labels have changed show the certificate of their new identity.
func (s *Sandbox) relabel(ctx context.Context, list []*corev1.Pod) error {
	var g errgroup.Group
	for _, o := range list {
		p := s.pods[o.Namespace+"/"+o.Name]
		p.spec = o
		if p.agent == nil {
			continue
		}
		g.Go(func() error {
			// The agent knows of the change once it has confirmed the verdicts; from then on it is ready when Envoy has the certificate.
			if err := s.cp.Server().Ledger().Wait(ctx, server.Client(p.name)); err != nil {
				return fmt.Errorf("sidecar of %s: %w", p.name, err)
			}
			if err := p.agent.waitReady(ctx); err != nil {
				return fmt.Errorf("sidecar of %s: %w", p.name, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// replaced reports whether a pod has to be made anew: a running one keeps its account, its addresses and its ports, and the labels of one
// that belongs to a workload change with the workload's template.
func replaced(old, next *corev1.Pod) bool {
	owned := len(old.OwnerReferences) > 0 || len(next.OwnerReferences) > 0
	return owned && !maps.Equal(old.Labels, next.Labels) || !maps.Equal(old.Annotations, next.Annotations) ||
		!equality.Semantic.DeepEqual(old.Spec, next.Spec) || !equality.Semantic.DeepEqual(old.Status.PodIPs, next.Status.PodIPs)
}
