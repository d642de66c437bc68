package agent

import (
	"context"
	"net/netip"
)

// envoyKnows lets every SYN to a destination inside the cluster go on to Envoy, as long as the relay cannot be asked.
type envoyKnows struct{}

func (envoyKnows) Ask(context.Context, netip.AddrPort) (bool, error) { return true, nil }

func (envoyKnows) Forget([]netip.AddrPort) {}
