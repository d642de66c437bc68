package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// app is an app in a pod, from this side.
type app struct {
	pod     string
	process *netns.Process
	in, out io.Closer
	orders  *json.Encoder
	replies *json.Decoder
}

// startApp starts an app in a pod; a server listens when it returns. The pod ends it, if nobody does before.
func startApp(ctx context.Context, pod *netns.Pod, which string) (*app, error) {
	theirIn, in, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, theirIn.Close(), in.Close())
	}
	a := &app{pod: pod.Name(), in: in, out: out, orders: json.NewEncoder(in), replies: json.NewDecoder(out)}
	a.process, err = pod.Start(context.WithoutCancel(ctx), netns.Command{ // stop ends it, or its pod
		Path: "/proc/self/exe", Args: []string{appArgument, which}, Stdin: theirIn, Stdout: theirOut, Stderr: os.Stderr, User: netns.App,
	})
	if err := errors.Join(err, theirIn.Close(), theirOut.Close()); err != nil {
		return nil, errors.Join(err, in.Close(), out.Close())
	}
	if which == appServer {
		_, err = a.reply()
	}
	return a, err
}

func (a *app) reply() (outcome, error) {
	var got outcome
	if err := a.replies.Decode(&got); err != nil {
		return got, fmt.Errorf("the app of %s does not answer: %w", a.pod, err)
	}
	if got.Error != "" {
		return got, fmt.Errorf("the app of %s: %s", a.pod, got.Error)
	}
	return got, nil
}

// do has a client carry out an order.
func (a *app) do(o order) (outcome, error) {
	if err := a.orders.Encode(o); err != nil {
		return outcome{}, fmt.Errorf("the app of %s: %w", a.pod, err)
	}
	return a.reply()
}

// stop ends the app and waits for that.
func (a *app) stop() error {
	err := a.in.Close()
	return errors.Join(err, a.process.Wait(), a.out.Close())
}
