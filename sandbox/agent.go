package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/mantlet/mantlet/sandbox/netns"
)

// agentRun is what all agents are started with.
type agentRun struct {
	binary, envoy, bundle, trustDomain string
	single                             bool // one uid only: Envoy is told apart by its socket mark
	lifetimes                          Lifetimes
}

// agent is a running mantlet-agent.
type agent struct {
	dir     string
	process *netns.Process
	flows   *flowLog
	stderr  *tail
}

// start starts the agent of a pod. Its sockets, token and Envoy's configuration live in dir.
func (r agentRun) start(ctx context.Context, p *netns.Pod, controlPlane, dir, token string) (*agent, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	tokenFile := filepath.Join(dir, "token")
	if err := os.WriteFile(tokenFile, []byte(token), 0o600); err != nil {
		return nil, err
	}
	exempt := "uid"
	if r.single {
		exempt = "mark"
	}
	a := &agent{dir: filepath.Join(dir, "run"), flows: newFlowLog(), stderr: &tail{}}
	var err error
	a.process, err = p.Start(ctx, netns.Command{
		Path: r.binary,
		Args: append([]string{"run", "--pod", p.Name(), "--control-plane", controlPlane, "--trust-domain", r.trustDomain, "--bundle", r.bundle,
			"--token-file", tokenFile, "--envoy", r.envoy, "--run-dir", a.dir, "--flows", "-", "--exempt", exempt, "--drain-timeout", "1s"}, r.lifetimes.flags()...),
		Env:    []string{"PATH=/usr/bin:/bin"},
		Stdout: a.flows,
		Stderr: a.stderr,
		User:   netns.Root,
	})
	if err != nil {
		return nil, err
	}
	return a, nil
}

// readyPatience bounds the start of a sidecar: far more than it takes on a busy machine.
const readyPatience = 60 * time.Second

// waitReady asks the agent until it says ready; the agent itself holds the question until it can.
func (a *agent) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, readyPatience)
	defer cancel()
	socket := filepath.Join(a.dir, "status.sock")
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}}
	retry := time.NewTicker(5 * time.Millisecond) // until the agent has made its socket
	defer retry.Stop()
	last := "it never opened its status socket"
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/ready?wait=30s", nil)
		if err != nil {
			return err
		}
		if resp, err := client.Do(req); err == nil {
			body, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			last = string(bytes.TrimSpace(body))
		}
		select {
		case <-retry.C:
		case <-a.process.Done():
			return fmt.Errorf("the agent ended: %w\n%s", a.process.Wait(), a.stderr)
		case <-ctx.Done():
			return fmt.Errorf("not ready: %s\n%s", last, a.stderr)
		}
	}
}

func (a *agent) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopPatience)
	defer cancel()
	if err := a.process.Stop(ctx); err != nil && ctx.Err() == nil {
		return fmt.Errorf("agent in %s: %w\n%s", a.dir, err, a.stderr)
	}
	return errors.Join(a.flows.close())
}

// tail keeps the end of what a process says.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailBytes = 8 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if over := len(t.buf) - tailBytes; over > 0 {
		t.buf = append(t.buf[:0], t.buf[over:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}
