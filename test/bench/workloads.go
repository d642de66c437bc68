package main

import (
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// workload is something that happens to a cluster, over and over. What run does beside what it measures brings things back to where
// they can happen again.
type workload struct {
	name string
	most int // runs at most: the long ones
	run  func(*bench, int) (sample, error)
}

var workloads = []workload{
	{"policy-create", 0, func(b *bench, i int) (sample, error) { return b.there(b.another(8080), i) }},
	{"policy-update", 0, policyUpdate},
	{"policy-delete", 0, func(b *bench, i int) (sample, error) { return b.back(b.another(8080), i) }},
	{"scale-up", 0, func(b *bench, _ int) (sample, error) { up, down := b.scale(10); return b.and(up, down) }},
	{"scale-down", 0, func(b *bench, _ int) (sample, error) { up, down := b.scale(10); return b.after(up, down) }},
	{"rolling-restart", 3, rollingRestart},
	{"namespace-relabel", 0, relabel},
	{"service-change", 0, serviceChange},
	{"sustained", 1, sustained},
	{"svid-rotation", 3, svidRotation},
	{"restart", 3, restart},
}

// target is the service that changes are about.
func (b *bench) target() (s, other service) {
	n := len(b.world.services)
	return b.world.services[n/2], b.world.services[(n/2+1)%n]
}

// another is a second policy for the target service.
func (b *bench) another(port int32) *networkingv1.NetworkPolicy {
	s, other := b.target()
	return allowFrom(s, "more", other, port)
}

func put(list ...metav1.Object) change  { return change{{applied: list}} }
func drop(list ...metav1.Object) change { return change{{deleted: list}} }

// and measures a change and makes another that is not measured; after the other way round.
func (b *bench) and(c, then change) (sample, error) {
	s, err := b.measure(c)
	if err != nil {
		return s, err
	}
	if err := b.verify(); err != nil {
		return s, err
	}
	_, err = b.measure(then)
	return s, err
}

func (b *bench) after(first, c change) (sample, error) {
	if _, err := b.measure(first); err != nil {
		return sample{}, err
	}
	return b.measure(c)
}

func (b *bench) there(obj metav1.Object, _ int) (sample, error) { return b.and(put(obj), drop(obj)) }
func (b *bench) back(obj metav1.Object, _ int) (sample, error)  { return b.after(put(obj), drop(obj)) }

func policyUpdate(b *bench, i int) (sample, error) {
	if i == 0 {
		if _, err := b.measure(put(b.another(9000))); err != nil {
			return sample{}, err
		}
	}
	return b.measure(put(b.another(9001 + int32(i))))
}

// scale is a service with some pods more, and back.
func (b *bench) scale(by int) (up, down change) {
	s, _ := b.target()
	slice := b.world.objects["EndpointSlice "+s.namespace+"/"+s.name+"-x"].(*discoveryv1.EndpointSlice)
	larger := slice.DeepCopy()
	for range by {
		p := b.world.newPod(s.namespace, s.name, sidecar)
		up = append(up, step{applied: []metav1.Object{p}})
		down = append(down, step{deleted: []metav1.Object{p}})
		larger.Endpoints = append(larger.Endpoints, endpointOf(p))
	}
	return append(up, step{applied: []metav1.Object{larger}}), append(change{{applied: []metav1.Object{slice}}}, down...)
}

// rollingRestart replaces all pods of some services, one after the other: each change is a pod that goes, one that comes, and the slice. Their
// own sidecars come and go unmeasured; those that use the services are measured.
func rollingRestart(b *bench, i int) (sample, error) {
	n := len(b.world.services)
	stride := max(n/10, 2)
	var c change
	var gone, come []sidecarPod
	for k := i % 2; k < n && len(come) < 100; k += stride { // not those of the run before: whose clients are as they were
		s := &b.world.services[k]
		key := "EndpointSlice " + s.namespace + "/" + s.name + "-x"
		slice := b.world.objects[key].(*discoveryv1.EndpointSlice)
		for j, name := range s.pods {
			old := b.world.objects["Pod "+s.namespace+"/"+name].(*corev1.Pod)
			p := b.world.newPod(s.namespace, s.name, sidecar)
			slice = slice.DeepCopy()
			slice.Endpoints[j] = endpointOf(p)
			c = append(c, step{deleted: []metav1.Object{old}}, step{applied: []metav1.Object{p}}, step{applied: []metav1.Object{slice}})
			s.pods[j] = p.Name
			at := slices.IndexFunc(b.world.sidecars, func(q sidecarPod) bool { return q.uid == string(old.UID) })
			gone = append(gone, b.world.sidecars[at])
			b.world.sidecars[at] = sidecarPod{s.namespace, p.Name, string(p.UID), b.world.sidecars[at].uses}
			come = append(come, b.world.sidecars[at])
		}
	}
	for _, p := range gone {
		b.fleet[p.key()].close()
		delete(b.fleet, p.key())
	}
	s, err := b.measure(c)
	if err != nil {
		return s, err
	}
	if err := b.attest(come); err != nil {
		return s, err
	}
	concerned := map[string]versions{}
	for _, p := range come {
		concerned[p.key()] = b.want[p.key()]
	}
	arrivals := b.expectAll(concerned)
	for _, p := range come {
		b.fleet[p.key()].connect()
	}
	_, err = b.await(arrivals, len(come))
	return s, err
}

func relabel(b *bench, i int) (sample, error) {
	if i == 0 {
		p := b.another(8080)
		p.Name = "guests"
		p.Spec.Ingress[0].From = []networkingv1.NetworkPolicyPeer{{NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": "red"}}}}
		if _, err := b.measure(put(p)); err != nil {
			return sample{}, err
		}
	}
	return b.measure(put(guests([]string{"red", "white"}[i%2])))
}

// serviceChange has one endpoint of a service not ready, or ready again.
func serviceChange(b *bench, i int) (sample, error) {
	s, _ := b.target()
	slice := b.world.objects["EndpointSlice "+s.namespace+"/"+s.name+"-x"].(*discoveryv1.EndpointSlice).DeepCopy()
	ready := i%2 == 1
	slice.Endpoints[0].Conditions.Ready = &ready
	return b.measure(put(slice))
}

// svidRotation has all sidecars renew at once.
func svidRotation(b *bench, _ int) (sample, error) {
	s := sample{Sidecars: len(b.fleet), Affected: len(b.fleet)}
	before, err := b.settle()
	if err != nil {
		return s, err
	}
	b.expectAll(nil) // nobody is to be sent anything
	renewed := make(chan arrival, len(b.fleet))
	client, began := cpu(), clock()
	for name, sc := range b.fleet {
		updated := sc.source.Updated()
		sc.source.Renew()
		go func() {
			select {
			case <-updated:
				renewed <- arrival{name, clock()}
			case <-b.ctx.Done():
			}
		}()
	}
	times, err := b.await(renewed, len(b.fleet))
	if err != nil {
		return s, err
	}
	client = cpu() - client
	after, err := b.settle()
	if err != nil {
		return s, err
	}
	s.times(times, began)
	s.used(before, after, client)
	err = b.count(&s)
	return s, err
}

// restart kills the control plane and starts another one. The clock starts when that listens; reading and compiling was before.
func restart(b *bench, _ int) (sample, error) {
	s := sample{Sidecars: len(b.fleet), Affected: len(b.fleet)}
	if err := b.plane.kill(); err != nil {
		return s, err
	}
	arrivals := make(chan arrival, len(b.fleet))
	for name, sc := range b.fleet {
		sc.expectAgain(b.want[name], arrivals)
	}
	client := cpu()
	if err := b.start(b.address); err != nil {
		return s, err
	}
	times, err := b.await(arrivals, len(b.fleet))
	if err != nil {
		return s, err
	}
	client = cpu() - client
	after, err := b.settle()
	if err != nil {
		return s, err
	}
	s.times(times, b.plane.hello.At)
	s.used(b.plane.hello.Figures, after, client)
	err = b.count(&s)
	return s, err
}

// coldStart starts a cluster and has all its sidecars connect at once. They have their SVIDs already: svid-rotation measures what those cost.
func coldStart(b *bench) (sample, error) {
	s := sample{Sidecars: len(b.world.sidecars), Affected: len(b.world.sidecars)}
	if err := b.attest(b.world.sidecars); err != nil {
		return s, err
	}
	before, err := b.settle()
	if err != nil {
		return s, err
	}
	arrivals := b.expectAll(b.want)
	client, began := cpu(), clock()
	for _, sc := range b.fleet {
		sc.connect()
	}
	times, err := b.await(arrivals, len(b.fleet))
	if err != nil {
		return s, err
	}
	client = cpu() - client
	after, err := b.settle()
	if err != nil {
		return s, err
	}
	s.times(times, began)
	s.used(before, after, client)
	err = b.count(&s)
	return s, err
}

// attempt runs a workload and holds every sidecar against what it must hold, each time.
func (w workload) measure(b *bench, runs int) (sample, error) {
	if w.most > 0 {
		runs = min(runs, w.most)
	}
	var all []sample
	for i := range runs {
		s, err := w.run(b, i)
		if err == nil {
			err = b.verify()
		}
		if err != nil {
			return sample{}, fmt.Errorf("workload %s, run %d: %w", w.name, i, err)
		}
		all = append(all, s)
	}
	return median(w.name, all)
}
