package sandbox

import (
	"strings"
	"testing"

	"github.com/mantlet/mantlet/sandbox/matrix"
	"github.com/mantlet/mantlet/verdict"
)

// TestTried: SCTP is never tried, and that is said.
func TestTried(t *testing.T) {
	all := []matrix.Attempt{{Protocol: verdict.TCP, Via: matrix.ViaService}, {Protocol: verdict.UDP}, {Protocol: verdict.SCTP}, {Protocol: verdict.SCTP, Via: matrix.ViaService}}
	tried, notices, err := Tried(all)
	if err != nil || len(tried) != 2 || len(notices) != 1 || !strings.HasPrefix(notices[0], "2 SCTP connections are not tried: ") {
		t.Errorf("%v, %q, %v", tried, notices, err)
	}
	if _, notices, err := Tried(tried); err != nil || len(notices) != 0 {
		t.Errorf("nothing is left out: %q, %v", notices, err)
	}
	for protocol, want := range map[string]bool{"TCP": true, "UDP": true, "TC": false, "": false} {
		if has, err := kernelHas(protocol); err != nil || has != want {
			t.Errorf("the kernel has %q: %v, %v", protocol, has, err)
		}
	}
	if _, err := (&Sandbox{}).Try(t.Context(), all); err == nil || !strings.Contains(err.Error(), "SCTP cannot be tried") {
		t.Errorf("Try of SCTP: %v", err)
	}
}
