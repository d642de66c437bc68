package flows

import (
	"net/netip"

	"github.com/mantlet/mantlet/xds/names"
)

// Refused notes a connection that was refused in the kernel, before it got to Envoy.
func (r *Receiver) Refused(d Direction, source, destination netip.AddrPort) {
	r.Add(Record{Time: r.now(), Log: names.LogHold, Direction: d, Verdict: Denied, Self: r.self(), Source: source, Destination: destination})
}
