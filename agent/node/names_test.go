package node

import (
	"path"
	"testing"

	injected "github.com/mantlet/mantlet/controlplane/inject/names"
)

// The daemon finds in a pod's volume what injection has put there.
func TestNames(t *testing.T) {
	if Volume != injected.RunVolume {
		t.Errorf("the volume is called %q here and %q by injection", Volume, injected.RunVolume)
	}
	if dir := path.Dir(socketIn); path.Join(injected.RunMount, dir) != injected.RunDir {
		t.Errorf("the agent's folder is %q in the volume, and injection says %q in %q", dir, injected.RunDir, injected.RunMount)
	}
}
