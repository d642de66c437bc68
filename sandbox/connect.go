package sandbox

import (
	"fmt"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
)

// connectDiffers says in what the word of connect() differs from what the evaluator expects of a TCP connection, or "".
//
//	source        expected   connect() has to be
//	any           allowed    accepted: the app is there, and bytes prove it; nothing more to ask
//	sidecar       denied     refused, at the first attempt: its agent holds the SYN until the verdict is known
//	no sidecar    denied     anything: nothing guards the source, and the destination's sidecar has to accept a connection from inside the
//	                         cluster before it can see who comes. It is closed without a byte, and the app sees nothing of it.
//
// A source without a sidecar from outside the cluster is refused too; the matrix has only pods for sources.
func connectDiffers(source policy.Pod, expected string, o netns.Outcome) string {
	if expected == matrix.Allowed || !source.Sidecar || o.Connect == netns.Refused {
		return ""
	}
	return fmt.Sprintf("denied, and connect() was not refused but said %q (then: %s)", o.Connect, o.Err)
}
