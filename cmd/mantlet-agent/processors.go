package main

import (
	"os"
	"runtime"
)

// useProcessors has Go code run on so many processors at once, unless GOMAXPROCS says otherwise. An agent's work is short and now and then: each
// time a second processor wakes up to look for a share of it, which on a node full of sidecars is a quarter of the agents' CPU and delays whoever
// else has become runnable. System calls that take long, netlink's, do not count.
func useProcessors(n int) {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(1, n))
	}
}
