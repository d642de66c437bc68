package controlplane

import (
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mantlet/mantlet/controlplane/status"
	"github.com/mantlet/mantlet/xds/server"
)

// Report says what this replica knows of everybody: the policies that it holds, and what each sidecar said of what it was sent for them. It
// is one moment: what sidecars should hold is what follows from just these policies.
func (cp *ControlPlane) Report() status.Report {
	cp.mu.Lock()
	defer cp.mu.Unlock()
	r := status.Report{Time: cp.now().UTC(), TrustDomain: cp.policy.TrustDomain.Name()}
	if cp.authority != nil {
		r.Authority = cp.authority.Fingerprint()
		for _, root := range cp.authority.Bundle().X509Authorities() {
			r.Roots = append(r.Roots, root.NotAfter.UTC())
		}
		slices.SortFunc(r.Roots, time.Time.Compare)
	}
	modes := cp.index.Modes()
	for _, name := range slices.Sorted(maps.Keys(modes)) {
		r.Namespaces = append(r.Namespaces, status.Namespace{Name: name, Mode: modes[name].String(), Required: cp.required[name]})
	}
	sidecars := map[string]server.ClientStatus{}
	for _, c := range cp.xds.Ledger().Snapshot() {
		sidecars[string(c.Client)] = c
	}
	for _, name := range cp.index.PodNames() {
		p, _ := cp.index.Pod(name)
		pod := status.Pod{Name: name, UID: p.UID, Started: len(p.Addrs) > 0}
		if p.Sidecar {
			s := sidecar(sidecars[name])
			if g, ok := cp.given[name]; ok && g.uid == p.UID {
				s.Certificate, s.Given = g.until.UTC(), g.last.UTC()
				s.Current = r.Authority != "" && g.settled(r.Authority, r.Time)
			}
			pod.Sidecar = &s
		}
		r.Pods = append(r.Pods, pod)
	}
	for _, p := range cp.index.Policies() {
		r.Policies = append(r.Policies, status.Policy{Name: p.Name, UID: p.UID, Generation: p.Generation, Created: p.Created.UTC(), Pods: p.Pods, Problems: p.Problems})
	}
	return r
}

// sidecar is what the ledger says of one; the zero ClientStatus is one of which it knows nothing.
func sidecar(c server.ClientStatus) status.Sidecar {
	s := status.Sidecar{Connected: c.Connected, InForce: c.InForce, Since: c.Since.UTC()}
	for _, r := range c.Resources {
		if r.AckedAt.After(s.LastAck) {
			s.LastAck = r.AckedAt.UTC()
		}
		if r.InForce {
			continue
		}
		of := status.Resource{Type: r.Type[strings.LastIndexByte(r.Type, '.')+1:], Name: r.Name}
		if r.Refusal != nil {
			s.Refused = append(s.Refused, status.Refusal{Resource: of, Reason: r.Refusal.Reason, At: r.Refusal.At.UTC()})
		} else {
			s.Waiting = append(s.Waiting, of)
		}
	}
	return s
}
