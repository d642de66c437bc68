package matrix

import (
	"fmt"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/verdict"
)

// Simulate decides every attempt by the evaluator alone.
func Simulate(x *policy.Index, attempts []Attempt) *Report {
	r := &Report{Connections: make([]Connection, len(attempts))}
	for i, a := range attempts {
		r.Connections[i] = decide(x, a)
	}
	r.Summarize()
	return r
}

// EnforcedBy says by what a peer was told when an attempt was decided.
type EnforcedBy string

// By what peers are told.
const (
	// ByIdentity: mTLS between two sidecars; the peer proves who it is.
	ByIdentity EnforcedBy = "identity"
	// ByAddress: at most one end has a sidecar, or the protocol is UDP or SCTP, which nobody authenticates.
	ByAddress EnforcedBy = "address"
	// ByNobody: no end has a sidecar, or a pod talks to itself.
	ByNobody EnforcedBy = "nobody"
)

// enforcedBy says by what the ends of a connection tell each other; to is the zero value for what is no pod.
func enforcedBy(proto verdict.Protocol, from policy.Pod, to policy.Endpoint) EnforcedBy {
	switch {
	case from.Name == to.Pod, !from.Sidecar && !to.Sidecar:
		return ByNobody
	case proto == verdict.TCP && from.Sidecar && to.Sidecar:
		return ByIdentity
	}
	return ByAddress
}

// decide says what the evaluator makes of an attempt. To a service it is what becomes of its endpoints: one that is admitted is
// enough, because the sidecar picks among those only. Without a sidecar the node picks one without asking any policy; then all
// have to be admitted for the connection to be called allowed.
func decide(x *policy.Index, a Attempt) Connection {
	c := Connection{From: a.From, To: a.To, Address: a.Addr.Addr().String(), Port: a.Addr.Port(), Protocol: a.Protocol.String(), Via: a.Via}
	pod, _ := x.Pod(a.From)
	d, _ := x.DestinationFor(a.From, a.Protocol, a.Addr)
	if a.Via != ViaService {
		var to policy.Endpoint
		if len(d.Endpoints) == 1 {
			to = d.Endpoints[0]
		}
		c.fill(answer{x.Answer(a.From, a.Protocol, a.Addr), enforcedBy(a.Protocol, pod, to)})
		return c
	}
	if len(d.Endpoints) == 0 {
		c.fill(answer{policy.Answer{Reason: verdict.Reason{Text: absence(d)}}, ByNobody})
		return c
	}
	if pod.Sidecar && !x.ComesFrom(a.From, d) {
		c.fill(answer{policy.Answer{Reason: verdict.Reason{Text: fmt.Sprintf("service %s takes no client from there at its load balancer (loadBalancerSourceRanges)", d.Service)}}, ByNobody})
		return c
	}
	var allowed, denied []answer
	for _, e := range d.Endpoints {
		ans := answer{x.Answer(a.From, a.Protocol, e.Addr), enforcedBy(a.Protocol, pod, e)}
		if ans.Allowed {
			allowed = append(allowed, ans)
		} else {
			denied = append(denied, ans)
		}
	}
	if one := x.Admitted(a.From, d); pod.Sidecar && d.Sticky && len(one) > 0 {
		allowed = []answer{{x.Answer(a.From, a.Protocol, one[0].Addr), enforcedBy(a.Protocol, pod, one[0])}}
	}
	switch {
	case len(allowed) == 0:
		c.fill(denied[0])
	case len(denied) == 0 || pod.Sidecar:
		c.fill(allowed[0])
		// Authenticated, and by identity, only if whichever endpoint is picked proves itself.
		for _, other := range allowed {
			if !other.Authenticated {
				c.Authenticated, c.EnforcedBy = false, other.by
				break
			}
		}
	default:
		c.fill(allowed[0])
		c.Partly = fmt.Sprintf("%d of %d endpoints are denied, and without a sidecar nothing steers around them", len(denied), len(d.Endpoints))
	}
	return c
}

// absence says why a destination has no endpoint for a client.
func absence(d policy.Destination) string {
	switch {
	case len(d.Others) == 0:
		return "the service has no endpoint"
	case d.Local:
		return "the service has no ready endpoint on the client's node (internalTrafficPolicy: Local)"
	}
	return "the service has no ready endpoint"
}

// answer is the evaluator's, with by what the peer was told.
type answer struct {
	policy.Answer
	by EnforcedBy
}

func (c *Connection) fill(a answer) {
	c.Verdict = Denied
	if a.Allowed {
		c.Verdict = Allowed
	}
	c.Authenticated = a.Authenticated
	c.EnforcedBy = a.by
	c.Reason = a.Reason
}
