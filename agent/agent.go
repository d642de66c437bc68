package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/mantlet/mantlet/agent/envoy"
	"github.com/mantlet/mantlet/agent/flows"
	"github.com/mantlet/mantlet/agent/hold"
	"github.com/mantlet/mantlet/agent/netfilter"
	"github.com/mantlet/mantlet/agent/relay"
	"github.com/mantlet/mantlet/agent/revoke"
	"github.com/mantlet/mantlet/agent/sds"
	"github.com/mantlet/mantlet/agent/verdicts"
	"github.com/mantlet/mantlet/identity/svid"
	"github.com/mantlet/mantlet/xds/names"
)

// Run is the agent of one pod, in the network namespace of the process. It returns nil after a graceful stop, when ctx has ended, and an error
// as soon as something fails that cannot be repaired. Either way Envoy is gone and the redirect stays: the pod is closed.
func Run(ctx context.Context, cfg Config) (err error) {
	began := time.Now()
	a, err := prepare(cfg)
	if err != nil {
		return err
	}
	return a.run(ctx, began)
}

// prepare closes the pod, where that is not the node's to do, and makes the parts.
func prepare(cfg Config) (*agent, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	user, known, err := cfg.envoyUser()
	if err != nil {
		return nil, err
	}
	cfg.user = user
	if cfg.Capture == CaptureNode {
		return assemble(cfg, nil, nil)
	}
	rules, err := cfg.redirect()
	if err != nil {
		return nil, err
	}
	redirect, err := netfilter.New(rules, cfg.Logger)
	if err != nil {
		return nil, err
	}
	closed := hold.Shut // whoever is exempt in a hold that is there is somebody else
	if known {
		closed = shut
	}
	if err := closed(cfg.hold()); err != nil { // before the redirect: nothing is accepted here that is not known to be allowed
		return nil, err
	}
	if err := redirect.Apply(); err != nil { // before all else: closed from here on
		return nil, err
	}
	packets, err := closePackets(cfg.Logger)
	if err != nil {
		return nil, err
	}
	return assemble(cfg, redirect, packets)
}

// agent holds the parts.
type agent struct {
	cfg       Config
	dir       *runDir
	source    *svid.Builtin
	upstream  *relay.Connection
	relay     *relay.Relay
	verdicts  *verdicts.Holder
	kernel    kernel
	sds       *sds.Server
	identity  *ownIdentity
	flows     *flows.Receiver
	revoker   *revoke.Revoker
	peer      *peer
	envoy     *envoy.Process
	readiness *readiness
	held      held
	stopping  chan struct{} // closed when the agent begins to stop
	exempted  *signal       // given when the redirect lets the agent's connections pass

	socket, statusSocket net.Listener
}

// assemble makes the parts and their sockets; nothing runs yet. On error nothing is left open. Redirect and packets are those of this process;
// the node has its own.
func assemble(cfg Config, redirect *netfilter.Redirect, packets *packets) (_ *agent, err error) {
	a := &agent{cfg: cfg, stopping: make(chan struct{}), exempted: newSignal()}
	defer func() {
		if err != nil {
			a.closeFiles()
		}
	}()
	if a.held, err = holdPorts(cfg.user, names.InboundPort, names.OutboundPort); err != nil {
		return nil, err
	}
	if a.dir, err = openRunDir(cfg.RunDir, cfg.Exempt, cfg.user); err != nil {
		return nil, err
	}
	if a.socket, err = a.dir.listen(AgentSocket(cfg.RunDir), 0o660, a.dir.gid); err != nil {
		return nil, err
	}
	if a.statusSocket, err = a.dir.listen(StatusSocket(cfg.RunDir), 0o600, -1); err != nil {
		return nil, err
	}
	a.source, err = svid.NewBuiltin(svid.BuiltinConfig{
		Address: cfg.ControlPlane, TrustDomain: cfg.TrustDomain, Bundle: cfg.Bundle, Reread: cfg.Reread, Token: cfg.Token, Log: cfg.Logger,
		DialContext: func(ctx context.Context, addr string) (net.Conn, error) { return a.dial(ctx, "tcp", addr) }, MaxAge: cfg.RenewAfter,
	})
	if err != nil {
		return nil, err
	}
	a.upstream, err = relay.Upstream{
		Address: cfg.ControlPlane, TrustDomain: cfg.TrustDomain, SVID: a.source, Bundle: a.source, Token: cfg.Token, DialContext: a.dial,
	}.Connect()
	if err != nil {
		return nil, err
	}
	a.relay = relay.New(a.upstream, a.source.Ready(), cfg.Logger)
	a.verdicts = verdicts.New()
	if err := a.openKernel(redirect, packets); err != nil {
		return nil, err
	}
	a.relay.OnDestinations(a.kernel.flip)
	a.relay.Subscribe(relay.Own{TypeURL: names.TypeNetwork, Name: names.Network, Apply: a.kernel.applyNetwork})
	a.relay.Subscribe(relay.Own{TypeURL: names.TypeVerdicts, Name: names.Verdicts, Apply: a.kernel.applyVerdicts})
	a.relay.Subscribe(relay.Own{TypeURL: names.TypePackets, Name: names.Packets, Apply: a.kernel.applyPackets})
	a.sds = sds.New(a.source, cfg.SessionBound, cfg.Logger)
	a.identity = &ownIdentity{verdicts: a.verdicts, source: a.source, held: a.sds.Held, log: cfg.Logger}
	a.relay.OnRefused(a.identity.refused)
	a.flows = flows.New(cfg.Flows, a.self, cfg.Logger)
	if err := a.watchConnections(); err != nil {
		return nil, err
	}
	a.peer = newPeer(cfg.user)
	a.envoy, err = envoy.New(envoy.Config{
		Path: cfg.Envoy, Dir: EnvoyDir(cfg.RunDir), Pod: cfg.Pod, AgentSocket: AgentSocket(cfg.RunDir),
		Privilege: cfg.Exempt, User: cfg.user, Concurrency: cfg.Concurrency, DrainTimeout: cfg.DrainTimeout, Output: cfg.EnvoyLog, Logger: cfg.Logger,
		Started: a.peer.set,
		Exited: func() {
			a.peer.set(0)
			a.relay.Ledger().Forget()
			a.revoker.Forget()
		},
	})
	if err != nil {
		return nil, err
	}
	a.readiness = &readiness{
		tables: []table{a.kernel}, source: a.source, ledger: a.relay.Ledger(), verdicts: a.verdicts, packets: a.kernel, identity: a.identity.missing,
		trouble: a.relay.Trouble, envoy: a.peer, stopping: a.stopping, beginning: newBeginning(cfg),
	}
	return a, nil
}

// openKernel makes what enforces in the kernel, or the way to it.
func (a *agent) openKernel(redirect *netfilter.Redirect, packets *packets) error {
	if a.cfg.Capture == CaptureNode {
		l, err := a.dir.listen(NodeSocket(a.cfg.RunDir), 0o600, -1)
		if err != nil {
			return err
		}
		a.kernel = newRemote(l, a.relay, a.verdicts, a.refused, a.exempted.give, a.cfg.Logger)
		return nil
	}
	held := a.cfg.hold()
	held.Refused = a.refused
	a.kernel = &local{redirect: redirect, packets: packets, hold: newSynHold(held, a.relay, a.verdicts, a.cfg.Logger), logger: a.cfg.Logger}
	return nil
}

// self is the pod's own SPIFFE ID, or "" while it has none.
func (a *agent) self() string {
	s, err := a.source.GetX509SVID()
	if err != nil {
		return ""
	}
	return s.ID.String()
}

func (a *agent) closeFiles() {
	a.held.close()
	if a.revoker != nil {
		a.revoker.Close()
	}
	switch k := a.kernel.(type) {
	case *remote:
		_ = k.listener.Close()
	case *local:
		k.close()
	}
	if a.upstream != nil {
		_ = a.upstream.Close()
	}
	for _, l := range []net.Listener{a.socket, a.statusSocket} {
		if l != nil {
			_ = l.Close()
		}
	}
	if a.dir != nil {
		_ = a.dir.close()
	}
}

// flowsPatience bounds how long the last flow records may take to be written.
const flowsPatience = time.Second

// envoyWindow is how many bytes Envoy may send ahead, on each stream and in all. It is fixed: to find a better one gRPC would answer what Envoy sends
// with a ping, and a log entry for each connection is what Envoy sends.
const envoyWindow = 1 << 20

// run runs the parts. Envoy ends first, with all that it needs still there; then the rest ends in the order in which it is
// no longer needed.
func (a *agent) run(ctx context.Context, began time.Time) error {
	defer a.closeFiles()
	server := grpc.NewServer(grpc.ForceServerCodecV2(relay.Codec()), grpc.StaticConnWindowSize(envoyWindow), grpc.StaticStreamWindowSize(envoyWindow))
	a.relay.Register(server)
	a.sds.Register(server)
	a.flows.Register(server)
	probes := &http.Server{Handler: statusHandler(a.readiness, a.cfg.Logger), ReadHeaderTimeout: 5 * time.Second}

	rest, endRest := context.WithCancel(context.WithoutCancel(ctx)) // outlives Envoy
	defer endRest()
	logs, endLogs := context.WithCancel(context.WithoutCancel(ctx)) // outlives the rest
	defer endLogs()
	written := make(chan struct{})
	go func() {
		a.flows.Run(logs)
		close(written)
	}()

	parts, failed := errgroup.WithContext(ctx)
	parts.Go(func() error { return named("agent socket", server.Serve(guarded{a.socket, a.peer, a.cfg.Logger})) })
	parts.Go(func() error { return named("status socket", probes.Serve(a.statusSocket)) })
	parts.Go(func() error { return a.source.Run(rest) })
	parts.Go(func() error { a.identity.follow(rest); return nil })
	parts.Go(func() error { a.revoker.Run(rest); return nil })
	parts.Go(func() error { return a.kernel.run(rest) })
	parts.Go(func() error { a.readiness.watch(rest, began, a.cfg.Logger); return nil })
	parts.Go(func() error {
		<-failed.Done()
		close(a.stopping)
		return nil
	})
	parts.Go(func() error {
		err := a.envoy.Run(failed)
		endRest()
		a.sds.Close()
		a.relay.Close()
		server.Stop()
		_ = probes.Close()
		return err
	})
	err := parts.Wait()
	endLogs()
	select {
	case <-written:
	case <-time.After(flowsPatience):
		a.cfg.Logger.Error("agent: the flow records' writer blocks; the last ones are lost")
	}
	return errors.Join(err, a.readiness.beginning.failed())
}

// named leaves out the errors that a server that was stopped ends with.
func named(what string, err error) error {
	if err == nil || errors.Is(err, http.ErrServerClosed) || errors.Is(err, grpc.ErrServerStopped) {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}
