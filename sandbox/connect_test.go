package sandbox

import (
	"testing"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
)

func TestConnectDiffers(t *testing.T) {
	for _, c := range []struct {
		guarded  bool
		expected string
		connect  string
		differs  bool
	}{
		{true, matrix.Allowed, netns.Connected, false},
		{true, matrix.Denied, netns.Refused, false},
		{true, matrix.Denied, netns.Connected, true}, // the local sidecar has accepted for somebody who is not there
		{true, matrix.Denied, netns.Reset, true},
		{true, matrix.Denied, netns.TimedOut, true}, // held, and never decided
		{true, matrix.Denied, netns.Unreachable, true},
		{true, matrix.Denied, "", true},
		{false, matrix.Allowed, netns.Connected, false},
		{false, matrix.Denied, netns.Refused, false},   // a Service without endpoints: the node refuses
		{false, matrix.Denied, netns.Connected, false}, // the destination's sidecar accepts, and closes
	} {
		if got := connectDiffers(policy.Pod{Sidecar: c.guarded}, c.expected, netns.Outcome{Connect: c.connect, Err: netns.Closed}); (got != "") != c.differs {
			t.Errorf("guarded %v, expected %s, connect() %q: %q", c.guarded, c.expected, c.connect, got)
		}
	}
}
