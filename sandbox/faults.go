package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mantlet/mantlet/controlplane/policy"
	"github.com/mantlet/mantlet/controlplane/source"
)

// What fails in a cluster, done to a sandbox: control planes, Envoys and agents that are killed and come back.
//
// The control plane lives in this process, so killing it means closing its sockets and dropping everything that it held. That is all that
// a sidecar can notice of a killed process: the kernel closes its sockets in the same way. What survives is what survives in a
// cluster: the objects, the CA's key, and the tokens, which the API server vouches for.

// StopControlPlane ends the control plane as a kill would: listeners and connections are closed at once, nobody is told why, and what it
// knew is gone. Until StartControlPlane, ControlPlane is nil, and an Update reaches nobody.
func (s *Sandbox) StopControlPlane() {
	if s.cp == nil {
		return
	}
	s.grpc.Stop() // first the sockets: no stream can say goodbye
	s.cp.Close()
	s.serving.Wait()
	s.cp, s.grpc = nil, nil
}

// StartControlPlane starts a new control plane at the address of the one that was stopped, with the present objects.
func (s *Sandbox) StartControlPlane(ctx context.Context) error {
	if s.cp != nil {
		return errors.New("the control plane runs already; stop it first")
	}
	return s.startControlPlane(ctx)
}

// SlowControlPlane has everything that the control plane receives wait for so long; 0: no longer.
func (s *Sandbox) SlowControlPlane(delay time.Duration) { s.brake.slow(delay) }

// FreezeControlPlane has the control plane neither read nor write any more, as a stopped process: the kernel still takes connections and
// bytes for it. thaw ends that.
func (s *Sandbox) FreezeControlPlane() (thaw func()) { return s.brake.freeze() }

// updateUnserved is Update while there is no control plane: what is new waits for one.
func (s *Sandbox) updateUnserved(ctx context.Context, next *source.Manifests, d *difference) error {
	s.cfg.Manifests = next
	s.index = policy.NewIndex(s.cfg.Policy)
	if err := s.index.ApplyAll(&next.Objects); err != nil {
		return err
	}
	if err := s.dropPods(d.gone); err != nil {
		return err
	}
	for _, o := range d.relabelled {
		s.pods[o.Namespace+"/"+o.Name].spec = o
	}
	if err := s.lead(ctx); err != nil {
		return err
	}
	if err := s.makePods(ctx, d.fresh); err != nil {
		return err
	}
	if err := s.nameHosts(); err != nil {
		return err
	}
	_, err := s.launchAgents()
	return err
}

// Sidecar is what runs in an injected pod. Process numbers are those that the enclosure sees.
type Sidecar struct {
	Agent  int // 0: none runs
	Envoy  int // 0: none runs at this moment
	RunDir string
}

// Sidecar finds the processes of a pod's sidecar.
func (s *Sandbox) Sidecar(name string) (Sidecar, error) {
	p := s.pods[name]
	if p == nil || p.dir == "" {
		return Sidecar{}, fmt.Errorf("pod %s: it has no sidecar", name)
	}
	sc := Sidecar{RunDir: filepath.Join(p.dir, "run")}
	if p.agent == nil {
		return sc, nil
	}
	sc.Agent = p.agent.process.PID()
	var err error
	sc.Envoy, err = child(sc.Agent)
	return sc, err
}

// child returns the process that another one has started and that has not ended; 0: there is none.
func child(parent int) (int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		if field(string(text), "PPid") == strconv.Itoa(parent) && field(string(text), "State") != "Z (zombie)" {
			return strconv.Atoi(filepath.Base(filepath.Dir(f)))
		}
	}
	return 0, nil
}

// field reads one line of /proc/PID/status.
func field(status, name string) string {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// KillEnvoy kills a pod's Envoy and returns its process number. The agent starts another.
func (s *Sandbox) KillEnvoy(name string) (pid int, err error) {
	sc, err := s.Sidecar(name)
	switch {
	case err != nil:
		return 0, err
	case sc.Envoy == 0:
		return 0, fmt.Errorf("pod %s: no Envoy runs", name)
	}
	if err := syscall.Kill(sc.Envoy, syscall.SIGKILL); err != nil {
		return 0, fmt.Errorf("kill the Envoy of %s: %w", name, err)
	}
	return sc.Envoy, nil
}

// KillAgent kills a pod's agent, and with it its Envoy, and returns when both are gone. StartAgent brings them back.
func (s *Sandbox) KillAgent(name string) error {
	sc, err := s.Sidecar(name)
	switch {
	case err != nil:
		return err
	case sc.Agent == 0:
		return fmt.Errorf("pod %s: no agent runs", name)
	}
	p := s.pods[name]
	if err := syscall.Kill(sc.Agent, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill the agent of %s: %w", name, err)
	}
	<-p.agent.process.Done()
	err = p.agent.flows.close()
	p.agent = nil
	return err
}

// StartAgent starts the agent of a pod anew, as the kubelet does when a container has died, killed or by itself: in the same pod, with the files that
// the last one left. It does not wait.
func (s *Sandbox) StartAgent(name string) error {
	p := s.pods[name]
	if p == nil || p.dir == "" {
		return fmt.Errorf("pod %s: it has no sidecar", name)
	}
	if p.agent != nil {
		select {
		case <-p.agent.process.Done():
		default:
			return fmt.Errorf("pod %s: its sidecar runs", name)
		}
		if err := p.agent.flows.close(); err != nil {
			return err
		}
		p.agent = nil
	}
	run, err := s.agentRun()
	if err != nil {
		return err
	}
	return s.launch(run, p)
}

// AwaitReady waits until a pod's agent says ready.
func (s *Sandbox) AwaitReady(ctx context.Context, name string) error {
	p := s.pods[name]
	if p == nil || p.agent == nil {
		return fmt.Errorf("pod %s: no agent runs", name)
	}
	if err := p.agent.waitReady(ctx); err != nil {
		return fmt.Errorf("sidecar of %s: %w", name, err)
	}
	return nil
}

// AgentLog is the end of what a pod's agent and its Envoy have said.
func (s *Sandbox) AgentLog(name string) string {
	if p := s.pods[name]; p != nil && p.agent != nil {
		return p.agent.stderr.String()
	}
	return ""
}
