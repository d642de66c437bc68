package flows

import (
	"slices"
	"strings"

	"github.com/mantlet/mantlet/xds/names"
)

// verdictOf reads the verdict on a connection from Envoy's log of it. The second result is false for what another log tells better.
//
// Any log: a termination by network RBAC is denied.
//
// names.LogGate, by the cluster that the gate chose:
//   - names.ClusterApp: allowed; failed if the app did not accept (UF, UO).
//   - names.ClusterDeny, or no chain at all: denied.
//
// names.LogInbound:
//   - TLS failed: denied, nobody proved who they are.
//   - names.ClusterApp (the pod's own node): as at the gate.
//   - names.ClusterDeny (the capture port itself), or no chain (NR): denied.
//   - names.ClusterToGate: the gate logs it.
//   - anything else, such as a peer that left before its first byte: failed.
//
// names.LogOutbound:
//   - names.ClusterDeny, or no chain (NR): denied.
//   - on demand, without endpoints (UH): denied; the control plane sends only those that policy admits.
//   - on demand, unknown (NC): failed. Either there is no such destination, or the control plane did not answer in time.
//   - any cluster: failed if the destination did not accept, or is not who it should be (UF, UO, URX); else allowed.
func verdictOf(r *Record) (Verdict, bool) {
	if strings.HasPrefix(r.Termination, "rbac_access_denied") {
		return Denied, true
	}
	noChain := slices.Contains(r.Flags, "NR")
	switch r.Log {
	case names.LogGate:
		if r.Cluster == names.ClusterApp {
			return connected(r), true
		}
		return Denied, true
	case names.LogInbound:
		switch {
		case r.TransportFailure != "" && r.Cluster != names.ClusterApp, r.Cluster == names.ClusterDeny, noChain:
			return Denied, true
		case r.Cluster == names.ClusterApp:
			return connected(r), true
		case r.Cluster == names.ClusterToGate:
			return "", false
		}
		return Failed, true
	case names.LogOutbound:
		switch {
		case r.Cluster == names.ClusterDeny, noChain:
			return Denied, true
		case strings.HasPrefix(r.Cluster, names.OnDemandPrefix) && slices.Contains(r.Flags, "UH"):
			return Denied, true
		case r.Cluster == "" || slices.Contains(r.Flags, "NC"):
			return Failed, true
		}
		return connected(r), true
	}
	return Failed, true
}

// connected tells whether Envoy's own connection onward came about.
func connected(r *Record) Verdict {
	for _, f := range []string{"UF", "UO", "URX", "UH"} {
		if slices.Contains(r.Flags, f) {
			return Failed
		}
	}
	return Allowed
}
