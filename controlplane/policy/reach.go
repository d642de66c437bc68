package policy

import (
	"net/netip"

	"github.com/mantlet/mantlet/verdict"
)

// Reach is what a client may reach at a destination. It is shared, and must not be changed.
type Reach struct {
	Known     bool       // the destination stands for something
	Endpoints []Endpoint // see Admitted
	// Own says that something of this client alone has a part in it, and that it is made anew for whoever asks: where the client is, the client itself
	// among the endpoints, its very address. Otherwise all clients of its subject get the very same, until the next change of the Index.
	Own bool
}

// question is what clients of a subject ask alike.
type question struct {
	subject *Subject
	proto   verdict.Protocol
	to      netip.AddrPort
}

// mostReached bounds the answers that are kept. What is asked between two changes is far less, but for when everybody comes at once.
const mostReached = 4096

// Reach returns what a client pod ("namespace/name") may reach at a destination: DestinationFor and Admitted, asked once for all replicas where
// they get the same.
func (x *Index) Reach(client string, proto verdict.Protocol, to netip.AddrPort) *Reach {
	p := x.pods[client]
	if p == nil || !p.sidecar { // who has no sidecar may be of the same subject all the same, and is judged otherwise
		d, known := x.DestinationFor(client, proto, to)
		return &Reach{Known: known, Endpoints: x.Admitted(client, d), Own: true}
	}
	q := question{p.subject, proto, to}
	if r := x.reached[q]; r != nil {
		return r
	}
	d, known := x.DestinationFor(client, proto, to)
	endpoints, own := x.admitted(client, d)
	r := &Reach{Known: known, Endpoints: endpoints, Own: own || d.own}
	if r.Own {
		return r
	}
	if len(x.reached) >= mostReached {
		clear(x.reached)
	}
	x.reached[q] = r
	return r
}
