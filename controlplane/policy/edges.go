package policy

import (
	"net/netip"
	"slices"
)

// countEdges follows which ipBlock boundaries lie inside the pod network and which volatile labels selectors mention: both take
// part in what tells subjects apart. Where they change, pods may move to other subjects.
func (x *Index) countEdges(old, p *netpol, c *change) {
	edges, keys := map[netip.Prefix]int{}, map[string]int{}
	count := func(q *netpol, by int) {
		if q == nil {
			return
		}
		for i := range q.egress.rules {
			for _, b := range q.egress.rules[i].blocks {
				for _, e := range append([]netip.Prefix{b.cidr}, b.except...) {
					if x.insidePodNetwork(e) {
						edges[e] += by
					}
				}
			}
		}
		for _, s := range q.selectors() {
			for i := range s.requirements {
				if k := s.requirements[i].Key(); x.namer.Volatile(k) {
					keys[k] += by
				}
			}
		}
	}
	count(old, -1)
	count(p, 1)
	moved := map[*pod]bool{}
	for e, n := range edges {
		if n == 0 {
			continue
		}
		had, _ := x.boundaries.Get(e)
		if had+n == 0 {
			x.boundaries.Delete(e)
		} else {
			x.boundaries.Insert(e, had+n)
		}
		if (had == 0) != (had+n == 0) {
			for _, pod := range x.pods {
				if slices.ContainsFunc(pod.ips, e.Contains) {
					moved[pod] = true
				}
			}
		}
	}
	for k, n := range keys {
		had := x.volatileKeys[k]
		x.volatileKeys[k] = had + n
		if had+n == 0 {
			delete(x.volatileKeys, k)
		}
		if (had == 0) != (had+n == 0) {
			for _, pod := range x.pods {
				if _, has := pod.labels[k]; has {
					moved[pod] = true
				}
			}
		}
	}
	for pod := range moved {
		x.rekey(pod, c)
	}
}

// insidePodNetwork reports whether a prefix can tell pods apart: it holds some of the pod network of its family, and not all.
func (x *Index) insidePodNetwork(e netip.Prefix) bool {
	holdsAll, touches := true, false
	for _, n := range x.podNetwork {
		if family(n.Addr()) != family(e.Addr()) {
			continue
		}
		touches = touches || n.Overlaps(e)
		holdsAll = holdsAll && e.Bits() <= n.Bits() && e.Contains(n.Addr())
	}
	return touches && !holdsAll
}

// selectors lists the selectors of a policy: its own and its pod peers.
func (p *netpol) selectors() []*selector {
	out := []*selector{p.pods}
	for _, d := range []*direction{&p.ingress, &p.egress} {
		for i := range d.rules {
			for _, s := range d.rules[i].selectors {
				out = append(out, s.pods)
			}
		}
	}
	return out
}
