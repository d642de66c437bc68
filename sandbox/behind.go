package sandbox

import (
	"net/netip"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/sandbox/matrix"
)

// The manifests may place pods on many nodes; here all of them share one. A sidecar balances for the node that its pod is on, so that
// nodes and zones count. Without a sidecar the service proxy of the one node balances, and to that they make no difference.

// behind lists the endpoints that may answer an attempt to a service.
func (s *Sandbox) behind(a matrix.Attempt) []policy.Endpoint {
	if p, _ := s.index.Pod(a.From); p.Sidecar {
		d, _ := s.index.DestinationFor(a.From, a.Protocol, a.Addr)
		return s.index.Admitted(a.From, d)
	}
	d, _ := s.index.Destination(a.Protocol, a.Addr)
	d.Sticky = false
	return s.index.Admitted(a.From, d)
}

// answersAs reports whether an endpoint goes by a name in answers: a pod's own, outside that of the range that it is in.
func (s *Sandbox) answersAs(e policy.Endpoint, name string) bool {
	if e.Pod != "" || s.pods[name] != nil {
		return e.Pod == name
	}
	outside, err := netip.ParsePrefix(name)
	return err == nil && outside.Contains(e.Addr.Addr())
}

// otherNodes reports whether an attempt without a sidecar is to a service for which the nodes of the manifests would decide.
func (s *Sandbox) otherNodes(a matrix.Attempt) bool {
	p, _ := s.index.Pod(a.From)
	here, _ := s.index.Destination(a.Protocol, a.Addr)
	there, _ := s.index.DestinationFor(a.From, a.Protocol, a.Addr)
	return a.Via == matrix.ViaService && !p.Sidecar && len(here.Endpoints) != len(there.Endpoints)
}
