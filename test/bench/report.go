package main

import (
	"encoding/json"
	"fmt"
	"io"
)

// reporter prints samples as they come.
func reporter(format string, out io.Writer) (func(sample) error, error) {
	switch format {
	case "json":
		e := json.NewEncoder(out)
		return func(s sample) error { return e.Encode(s) }, nil
	case "table":
		begun := false
		return func(s sample) error {
			if !begun {
				begun = true
				if _, err := fmt.Fprintf(out, "%-18s %8s %8s %7s %10s %8s %8s %8s %8s %10s %10s %8s %9s %10s %5s\n", "workload", "sidecars", "affected", "pushed", "bytes",
					"first ms", "p50 ms", "p99 ms", "last ms", "server ms", "client ms", "RSS MB", "allocs", "alloc KB", "load"); err != nil {
					return err
				}
			}
			_, err := fmt.Fprintf(out, "%-18s %8d %8d %7d %10d %8.1f %8.1f %8.1f %8.1f %10.1f %10.1f %8.1f %9d %10d %5s\n", s.Workload, s.Sidecars, s.Affected, s.Pushed, s.Bytes,
				s.First, s.P50, s.P99, s.Last, s.ServerCPU, s.ClientCPU, float64(s.RSS)/1e6, s.allocs, s.allocated/1000, load())
			if err == nil && s.Writes > 0 {
				_, err = fmt.Fprintln(out, "  "+s.String())
			}
			return err
		}, nil
	}
	return nil, fmt.Errorf("-o %q: there are table and json", format)
}
