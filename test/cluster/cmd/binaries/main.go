// Command binaries builds the cluster's binaries and writes their paths, one a line; all of them, or those that are named.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/mantlet/mantlet/test/cluster/binaries"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	names := os.Args[1:]
	if len(names) == 0 {
		names = binaries.Names()
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	for _, name := range names {
		path, err := binaries.Path(ctx, log, name)
		if err != nil {
			fmt.Fprintln(os.Stderr, "binaries:", err)
			os.Exit(1)
		}
		fmt.Fprintln(os.Stdout, path)
	}
}
