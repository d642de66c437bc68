package controlplane

import (
	"os"
	"runtime/debug"
)

// garbagePercent is how much garbage there may be before it is collected, in percent of what is in use. Go's default, 100, lets a control plane
// grow to twice what it needs when all sidecars come at once, and it gives that back slowly. What a change leaves behind is little: with half as
// much room the collector takes some hundredths of a change's CPU more (docs/performance.md).
const garbagePercent = 50

// LimitGarbage sets this process's garbage collector as a control plane needs it, unless the environment (GOGC) says something else.
func LimitGarbage() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(garbagePercent)
	}
}
