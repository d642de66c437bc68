package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
)

// process is a control plane in a process of its own, from this side.
type process struct {
	cmd      *exec.Cmd
	in       io.WriteCloser
	commands *json.Encoder
	replies  *json.Decoder
	hello    reply
}

// planeArgument makes this binary a control plane.
const planeArgument = "control-plane"

func startPlane(c planeConfig) (*process, error) {
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe", planeArgument) // it ends with its input
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("the control plane's process: %w", err)
	}
	p := &process{cmd: cmd, in: in, commands: json.NewEncoder(in), replies: json.NewDecoder(out)}
	if err := p.commands.Encode(c); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	if p.hello, err = p.read(); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

func (p *process) read() (reply, error) {
	var r reply
	if err := p.replies.Decode(&r); err != nil {
		return r, fmt.Errorf("the control plane's process does not answer: %w", err)
	}
	if r.Error != "" {
		return r, fmt.Errorf("the control plane's process: %s", r.Error)
	}
	return r, nil
}

func (p *process) do(c command) (reply, error) {
	if err := p.commands.Encode(c); err != nil {
		return reply{}, fmt.Errorf("the control plane's process: %w", err)
	}
	return p.read()
}

// parcels are a change as it goes over the pipe.
func parcels(c change) ([]stepParcel, error) {
	var out []stepParcel
	for _, s := range c {
		applied, err := pack(s.applied)
		if err != nil {
			return nil, err
		}
		deleted, err := pack(s.deleted)
		if err != nil {
			return nil, err
		}
		out = append(out, stepParcel{applied, deleted})
	}
	return out, nil
}

// stop ends the process as its end of input does.
func (p *process) stop() error { return errors.Join(p.in.Close(), p.cmd.Wait()) }

// kill ends it at once.
func (p *process) kill() error {
	if err := p.cmd.Process.Kill(); err != nil {
		return err
	}
	_ = p.cmd.Wait() // says that it was killed, and closes the pipes
	return nil
}
