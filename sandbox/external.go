package sandbox

import (
	"net/netip"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// External is the network namespace that plays the outside for a CIDR, to run something in.
func (s *Sandbox) External(prefix netip.Prefix) (*netns.External, bool) {
	x, ok := s.outsides[prefix]
	return x, ok
}
