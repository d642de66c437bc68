package flows

import (
	"slices"
	"strings"

	"github.com/mantlet/mantlet/xds/names"
)

// verdictOf reads the verdict on a connection from Envoy's log of it. The second result is false for what another log tells better.
//
// Any log:
//   - a termination by network RBAC: denied.
//   - a cluster without endpoints (UH): denied. Such are names.ClusterDeny and, on demand, a destination of which policy admits no endpoint.
//     Envoy does not say which cluster it was.
//   - no filter chain (NR): denied.
//
// names.LogGate, by the cluster that the gate chose:
//   - names.ClusterApp: allowed; failed if the app did not accept (UF, UO).
//   - anything else: denied.
//
// names.LogInbound:
//   - TLS failed: denied, nobody proved who they are.
//   - names.ClusterApp (the pod's own node): as at the gate.
//   - names.ClusterToGate: the gate logs it.
//   - anything else, such as a peer that left before its first byte: failed.
//
// names.LogOutbound:
//   - on demand, unknown (NC): failed. Either nobody has the address, or the control plane did not answer in time.
//   - any cluster: failed if the destination did not accept, or is not who it should be (UF, UO, URX); else allowed.
func verdictOf(r *Record) (Verdict, bool) {
	if strings.HasPrefix(r.Termination, "rbac_access_denied") || slices.Contains(r.Flags, "UH") || slices.Contains(r.Flags, "NR") {
		return Denied, true
	}
	switch r.Log {
	case names.LogGate:
		if r.Cluster == names.ClusterApp {
			return connected(r), true
		}
		return Denied, true
	case names.LogInbound:
		switch {
		case r.Cluster == names.ClusterApp:
			return connected(r), true
		case r.Cluster == names.ClusterToGate:
			return "", false
		case r.TransportFailure != "":
			return Denied, true
		}
	case names.LogOutbound:
		if r.Cluster != "" && !slices.Contains(r.Flags, "NC") {
			return connected(r), true
		}
	}
	return Failed, true
}

// connected tells whether Envoy's own connection onward came about.
func connected(r *Record) Verdict {
	for _, f := range []string{"UF", "UO", "URX"} {
		if slices.Contains(r.Flags, f) {
			return Failed
		}
	}
	return Allowed
}
