// Command traffic is what the pods of the cluster's tests connect with (package traffic).
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/mantlet/mantlet/test/incluster/traffic"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "traffic:", err)
		os.Exit(1) //nolint:gocritic // stop only ends the wait for signals
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		args = []string{""}
	}
	switch args[0] {
	case "pause":
		<-ctx.Done()
		return nil
	case "flood":
		return traffic.Flood(ctx, os.Stdout, args[1:])
	case "stream":
		return traffic.Stream(ctx, os.Stdout, args[1:])
	case "echo":
		if len(args) != 2 {
			return errors.New("echo: want the address where to listen, as host:port")
		}
		return traffic.Echo(ctx, args[1])
	case "try":
		lines := json.NewEncoder(os.Stdout)
		for _, to := range args[1:] {
			if err := lines.Encode(traffic.Try(ctx, to)); err != nil {
				return err
			}
		}
		return nil
	case "reach": // for init containers and Jobs, whose exit code counts
		for _, to := range args[1:] {
			if a := traffic.Try(ctx, to); a.Outcome != traffic.Reached {
				return fmt.Errorf("%s: %s: %s", a.To, a.Outcome, a.Error)
			}
		}
		return nil
	}
	return fmt.Errorf("%q is none of pause, flood, stream, echo, try, reach", args[0])
}
