package sandbox

import (
	"fmt"
	"os"
	"strings"

	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/sandbox/netns"
	"github.com/mantlet/mantlet/verdict"
)

// carried is how the sandbox's network calls a protocol, if there are probes for it.
func carried(p verdict.Protocol) (netns.Protocol, bool) {
	switch p {
	case verdict.TCP:
		return netns.TCP, true
	case verdict.UDP:
		return netns.UDP, true
	}
	return 0, false
}

// Tried returns the attempts that real packets can make, and says of the others how many there are and why they cannot be tried. The
// evaluator knows what becomes of those too.
func Tried(attempts []matrix.Attempt) (tried []matrix.Attempt, notices []string, err error) {
	sctp := 0
	for _, a := range attempts {
		if a.Protocol == verdict.SCTP {
			sctp++
			continue
		}
		tried = append(tried, a)
	}
	if sctp == 0 {
		return tried, nil, nil
	}
	has, err := kernelHas("SCTP")
	if err != nil {
		return nil, nil, err
	}
	why := "this kernel has no SCTP"
	if has {
		why = "the sandbox has no probe for SCTP"
	}
	return tried, []string{fmt.Sprintf("%d SCTP connections are not tried: %s; mantlet simulate says what becomes of them", sctp, why)}, nil
}

// kernelHas looks for a protocol among those that are there now. Asking for a socket instead would load the module into the machine.
func kernelHas(protocol string) (bool, error) {
	text, err := os.ReadFile("/proc/net/protocols")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(text)) {
		if name, _, _ := strings.Cut(line, " "); name == protocol {
			return true, nil
		}
	}
	return false, nil
}

// word is the word of a report for what a probe met with.
func word(text string) string {
	switch text {
	case netns.Connected:
		return matrix.Connected
	case netns.Refused:
		return matrix.Refused
	case netns.Reset:
		return matrix.Reset
	case netns.TimedOut:
		return matrix.TimedOut
	case netns.NotPermitted:
		return matrix.NotPermitted
	case netns.Unreachable, netns.NoNetwork:
		return matrix.Unreachable
	}
	return text
}
